"""Many texts at once against one at a time: `python -m experiments.benchmarks.generation`.

The same prompts of mixed lengths are continued greedily, with the cache, by one sampler that draws them together and by
one that draws them one by one (some of them: each costs the same). They take turns, and their texts have to be equal.
Also what the first token of one prompt costs, against a compiled forward pass over just that prompt: with the logits of
the last position only, and with those of all.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.benchmarks.measure import SHAPES, Spread, interleave, seconds_of, show, spread, write_numbers
from grug_native.attention import Mask
from grug_native.evaluation.drawing import Sampling
from grug_native.evaluation.generate import Prompt, Sampler
from grug_native.language_model import LanguageModel, cast_parameters, logits
from grug_native.loss import ComputeDtype
from grug_native.sharding import create_mesh

GREEDY = Sampling(temperature=0.0)

COLUMNS = ("", "median [10 %, 90 %]")


def make_prompts(number: int, vocab_size: int, longest: int, new: int) -> list[Prompt]:
    """Random tokens; the lengths are spread evenly from a quarter of the longest on."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(longest // 4, longest, number).astype(int)
    return [Prompt(rng.integers(0, vocab_size, length).tolist(), new, GREEDY) for length in rng.permutation(lengths)]


def measure_many(sampler: Sampler, prompts: Sequence[Prompt], alone: int, rounds: int) -> dict[str, Spread | float]:
    """Tokens a second, the reading of the prompts counted in.

    Args:
        sampler: the model; it takes all prompts at once.
        prompts: which to continue.
        alone: so many of them are drawn one by one in each round.
        rounds: turns of each contender.
    """
    one_by_one, every = replace(sampler, batch_size=1), len(prompts) // alone
    assert sampler.draw(prompts)[::every] == one_by_one.draw(prompts[::every]), "the texts differ"

    def rate(sampler: Sampler, prompts: Sequence[Prompt]) -> float:
        started = time.perf_counter()
        drawn = sampler.draw(prompts)
        return sum(map(len, drawn)) / (time.perf_counter() - started)

    contenders = {"many": lambda: rate(sampler, prompts), "one": lambda: rate(one_by_one, prompts[::every])}
    rates = interleave(contenders, rounds)
    return {
        f"{len(prompts)} at once [tokens/s]": spread(rates["many"]),
        "one at a time [tokens/s]": spread(rates["one"]),
        "at once / one at a time (bar: 8)": ratios(rates["many"], rates["one"]),
    }


def measure_first(sampler: Sampler, prompt_tokens: int, rounds: int) -> dict[str, Spread | float]:
    """What the first token of a prompt costs, from the call of the sampler to its return."""
    first = Prompt(list(range(1, prompt_tokens + 1)), 1, GREEDY)
    tokens, dtype = jnp.asarray([first.ids], jnp.int32), sampler.compute_dtype
    one_by_one = replace(sampler, batch_size=1)

    @jax.jit
    def last(params: LanguageModel, tokens: Array) -> Array:
        model = cast_parameters(params, dtype)
        return model.unembed(model.hidden(tokens, Mask())[0][:, -1])

    @jax.jit
    def whole(params: LanguageModel, tokens: Array) -> Array:
        return jnp.argmax(logits(cast_parameters(params, dtype), tokens, Mask()), axis=-1)

    def forward(function: Callable[[LanguageModel, Array], Array]) -> float:
        with jax.set_mesh(sampler.mesh):
            return seconds_of(lambda: function(sampler.params, tokens))

    contenders = {
        "first": lambda: seconds_of(lambda: one_by_one.draw([first])),
        "last": lambda: forward(last),
        "whole": lambda: forward(whole),
    }
    interleave(contenders, 2)
    seconds = interleave(contenders, rounds)
    return {
        f"first token of {prompt_tokens} [ms]": spread([1e3 * each for each in seconds["first"]]),
        "forward pass, last logits [ms]": spread([1e3 * each for each in seconds["last"]]),
        "first token / forward pass, last logits (bar: 1.5)": ratios(seconds["first"], seconds["last"]),
        "first token / forward pass, all logits (bar: 1.5)": ratios(seconds["first"], seconds["whole"]),
    }


def ratios(one: Sequence[float], other: Sequence[float]) -> Spread:
    """Of the turns of each round."""
    return spread([a / b for a, b in zip(one, other, strict=True)])


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with `--json`, writes the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be given again; by default all")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--alone", type=int, default=4, help="requests that are drawn one by one in each round")
    parser.add_argument("--longest", type=int, action="append", help="tokens of a prompt; by default 64, and 192")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--first-of", type=int, default=200, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    dtype: ComputeDtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    lengths: list[int] = arguments.longest or [64, 192]
    results: dict[str, dict[str, Spread | float]] = {}
    for shape in arguments.shape or list(SHAPES):
        # Weights that tell tokens apart by more than rounding.
        config = replace(SHAPES[shape][0], initializer_std=0.05)
        with jax.set_mesh(mesh := create_mesh(1, devices=jax.devices()[:1])):
            params = config.init(key=jax.random.key(0))
        sampler = Sampler(params, mesh, arguments.requests, dtype)
        for longest in lengths:
            prompts = make_prompts(arguments.requests, config.vocab_size, longest, arguments.new_tokens)
            name = f"{shape}, prompts of {longest // 4} to {longest}, {arguments.new_tokens} new"
            results[name] = measure_many(sampler, prompts, arguments.alone, arguments.rounds)
            show(f"{name}, {arguments.rounds} rounds", COLUMNS, list(results[name].items()))
        results[shape] = measure_first(sampler, arguments.first_of, 4 * arguments.rounds)
        show(f"{shape}, {4 * arguments.rounds} rounds", COLUMNS, list(results[shape].items()))
    if arguments.json is not None:
        write_numbers(arguments.json, results)


if __name__ == "__main__":
    main()
