"""What an evaluation costs the loop: `python -m experiments.benchmarks.eval_stall`.

Windows of equally many steps of the `tiny` model, in turn with an evaluation in front and without, as the loop does it:
nothing else runs meanwhile, so all of it is a stall. Once without a moving average of the parameters and once with one,
which is evaluated too. Also what the first evaluation takes, which compiles, how the speed of an evaluation compares to
that of training, and how often anything was compiled after the first step and the first evaluation: never, if the two
leave each other's compiled functions alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from experiments.benchmarks.measure import SHAPES, Spread, make_run, seconds_of, show, spread, write_numbers
from grug_native import GrugNativeRunConfig, GrugRunner


@dataclass(frozen=True)
class Stalls:
    """What the windows of a run took, in seconds."""

    first_step: float
    """With its compilation."""
    first: float
    """The first evaluation, with its compilation."""
    evaluations: tuple[float, ...]
    """The later ones."""
    after: tuple[float, ...]
    """The steps of the windows that an evaluation comes before, a window each."""
    plain: tuple[float, ...]
    """The steps of the other windows."""
    steps: int
    """Of a window."""
    compilations: int
    """After the first step and the first evaluation."""


@contextmanager
def count_compilations() -> Generator[list[str]]:
    """Collects an entry for everything that XLA compiles meanwhile."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(f"{duration_secs:.2f} s")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure(config: GrugNativeRunConfig, *, rounds: int, steps: int) -> Stalls:
    """Trains and evaluates by hand, in the loop's order."""
    runner = GrugRunner(config)
    batches = [runner.batch(step) for step in range(steps)]
    state = runner.init_state()

    def window(count: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for batch in batches[:count]:
            state, metrics = runner.train_step(state, batch)
            jax.block_until_ready(metrics)
        return time.perf_counter() - started

    def evaluate() -> float:
        return seconds_of(lambda: runner.evaluate(state))

    first_step, first = window(1), evaluate()
    window(1)  # the first step after an evaluation, in case that differs
    evaluations: list[float] = []
    after: list[float] = []
    plain: list[float] = []
    with count_compilations() as compiled:
        for _ in range(rounds):
            evaluations.append(evaluate())
            after.append(window(steps))
            plain.append(window(steps))
    return Stalls(first_step, first, tuple(evaluations), tuple(after), tuple(plain), steps, len(compiled))


def evaluate_numbers(stalls: Stalls, *, passes: int, eval_tokens: int, step_tokens: int) -> dict[str, float | Spread]:
    """The medians.

    Args:
        stalls: what was measured.
        passes: over the validation sets, of an evaluation.
        eval_tokens: of a pass.
        step_tokens: of a training step.
    """
    step = statistics.median(stalls.plain) / stalls.steps
    evaluation = statistics.median(stalls.evaluations)
    after = [one / other for one, other in zip(stalls.after, stalls.plain, strict=True)]
    return {
        "step [ms]": spread([1e3 * window / stalls.steps for window in stalls.plain]),
        "first step, compiling [s]": stalls.first_step,
        "first evaluation, compiling [s]": stalls.first,
        "evaluation [s]": spread(stalls.evaluations),
        "evaluation / step": evaluation / step,
        "tokens evaluated": float(passes * eval_tokens),
        "tokens/s of the evaluation / of training (ideal: 3)": (passes * eval_tokens / evaluation)
        / (step_tokens / step),
        "steps after an evaluation / others": spread(after),
        "compiled later": float(stalls.compilations),
    }


def eval_tokens_of(config: GrugNativeRunConfig) -> int:
    """Tokens that a pass over the validation sets takes in, padding of the last batches left out."""
    from levanter.utils.thread_utils import blocking_wait

    from grug_native.evaluation.perplexity import build_eval_sets

    sets = build_eval_sets(config.data, config.seq_len, config.model.vocab_size)
    assert config.eval.max_eval_batches is not None
    most = config.eval.max_eval_batches * config.trainer.batch_size_at(0)
    return config.seq_len * sum(min(most, blocking_wait(dataset.async_len())) for dataset, _ in sets)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with `--json`, writes the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of a window")
    parser.add_argument("--batches", type=int, default=8, help="of each validation set at most")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    results: dict[str, dict[str, float | Spread]] = {}
    for name, ema_beta in (("without EMA", None), ("with EMA", 0.999)):
        config = make_run(
            arguments.shape,
            cache_dir=arguments.cache_dir,
            folder=Path(tempfile.gettempdir()) / "grug-eval-stall",  # nothing is written there
            eval_batches=arguments.batches,
            ema_beta=ema_beta,
        )
        results[name] = evaluate_numbers(
            measure(config, rounds=arguments.rounds, steps=arguments.steps),
            passes=1 if ema_beta is None else 2,
            eval_tokens=eval_tokens_of(config),
            step_tokens=config.trainer.batch_size_at(0) * config.seq_len,
        )
    plain, averaged = results.values()
    rows = [(number, plain[number], averaged[number]) for number in plain]
    show(f"{arguments.shape}, {arguments.rounds} rounds", ("", *results), rows)
    if arguments.json is not None:
        write_numbers(arguments.json, results)


if __name__ == "__main__":
    main()
