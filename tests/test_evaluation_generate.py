from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jaxtyping import Array, Float

from grug_native.attention import Mask
from grug_native.evaluation import generate as module
from grug_native.evaluation.drawing import Sampling
from grug_native.evaluation.generate import Prompt, Sampler, generate, sampler_of
from grug_native.kernels.backend import Backend
from grug_native.language_model import logits, shard_parameters
from grug_native.model import Transformer
from grug_native.sharding import MeshAxes, create_mesh
from tests.fixtures_run import SMALL_MODEL

PROMPT = [7, 250, 3, 99, 12]
GREEDY = Sampling(temperature=0.0)

rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, 300, length).tolist() for length in (5, 1, 16, 9)]
NEW = (7, 16, 1, 12)


@pytest.fixture(scope="module")
def params() -> Transformer:
    """Weights large enough that the logits differ by more than rounding."""
    drawn = Transformer.init(SMALL_MODEL, key=jax.random.key(1))
    return jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, drawn)


@eqx.filter_jit
def full_logits(params: Transformer, tokens: Array) -> Float[Array, "B S V"]:
    return logits(params, tokens, Mask())


def by_hand(params: Transformer, prompt: Sequence[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        padded = jnp.array([ids + [0] * (32 - len(ids))])
        ids.append(int(jnp.argmax(full_logits(params, padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def spread(params: Transformer, axes: MeshAxes = MeshAxes()) -> tuple[Transformer, Mesh]:
    with jax.set_mesh(mesh := create_mesh(4, axes)):
        return jax.jit(shard_parameters)(params), mesh


def test_temperature_0_takes_the_likeliest_token_of_the_full_forward_pass(params: Transformer) -> None:
    assert generate(params, PROMPT, max_new_tokens=27, temperature=0.0) == by_hand(params, PROMPT, 27)
    assert generate(params, PROMPT, max_new_tokens=9, top_k=1, top_p=0.5, seed=5) == by_hand(params, PROMPT, 9)


def test_texts_of_a_batch_are_those_of_one_at_a_time(params: Transformer) -> None:
    def prompts(sampling: Sampling) -> list[Prompt]:
        return [Prompt(*own, sampling, seed) for seed, own in enumerate(zip(PROMPTS, NEW, strict=True))]

    alone, batched = sampler_of(params), sampler_of(params, batch_size=4)
    greedy = [by_hand(params, *own) for own in zip(PROMPTS, NEW, strict=True)]
    assert batched.draw(prompts(GREEDY)) == greedy == alone.draw(prompts(GREEDY))
    drawn = alone.draw(prompts(Sampling()))
    assert batched.draw(prompts(Sampling())) == drawn != greedy
    # Others beside them, of another kind and in another order, change nothing.
    mixed = [*prompts(GREEDY)[1:4], *prompts(Sampling())[::-1]]
    assert batched.draw(mixed) == [*greedy[1:4], *drawn[::-1]]
    on_mesh = Sampler(*spread(params, MeshAxes(replica_dcn=2, data=2)), 4)
    assert on_mesh.draw(mixed) == [*greedy[1:4], *drawn[::-1]]


def test_a_mesh_changes_nothing(params: Transformer) -> None:
    alone = generate(params, PROMPT, max_new_tokens=20, seed=3)
    on_mesh, mesh = spread(params)
    assert len(on_mesh.embed.sharding.device_set) == 4
    assert generate(on_mesh, PROMPT, max_new_tokens=20, seed=3) == alone
    with jax.set_mesh(mesh):
        assert generate(on_mesh, PROMPT, max_new_tokens=20, seed=3) == alone


def test_the_seed_decides(params: Transformer) -> None:
    drawn = [generate(params, PROMPT, max_new_tokens=20, seed=seed) for seed in (0, 0, 1, -1, 2**32 - 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == drawn[4]  # the same 32 bits
    # A longer text begins as the shorter one did.
    assert generate(params, PROMPT, max_new_tokens=17, seed=0) == drawn[0][:17]


def test_the_stop_token_ends_the_text_and_is_left_out(params: Transformer) -> None:
    whole = by_hand(params, PROMPT, 20)
    stop = whole[6]
    found = generate(params, PROMPT, max_new_tokens=20, temperature=0.0, stop_token=stop)
    assert found == whole[: whole.index(stop)]


def test_a_batch_ends_when_its_texts_have_ended(params: Transformer) -> None:
    asked: list[int] = []

    def is_over(ids: list[int]) -> bool:
        asked.append(len(ids))
        return len(ids) > 3

    [found, whole] = sampler_of(params, batch_size=2).draw(
        [Prompt(PROMPT, 27, GREEDY, is_over=is_over), Prompt(PROMPT, 20, GREEDY)]
    )
    assert asked == [1, 17]
    assert found == by_hand(params, PROMPT, 17)
    assert whole == by_hand(params, PROMPT, 20)


def test_no_more_texts_are_drawn_at_once_than_memory_allows(
    params: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Prompt(own, 8, GREEDY) for own in PROMPTS]
    sampler = sampler_of(params, batch_size=4)
    wanted = sampler.draw(prompts)
    rows: list[int] = []
    draw_batch = Sampler._draw_batch  # pyright: ignore[reportPrivateUsage] - its calls are counted

    def watched(self: Sampler, batch: Sequence[Prompt]) -> list[list[int]]:
        rows.append(len(batch))
        return draw_batch(self, batch)

    monkeypatch.setattr(Sampler, "_draw_batch", watched)
    # 2 layers x 2 heads x 8 features of keys and values for 16 + 16 positions in f32, and their segments.
    of_a_text = 2 * 2 * 2 * 8 * 32 * 4 + 32 * 4
    monkeypatch.setattr(module, "current_backend", lambda: Backend("gpu", (9, 0), 8 * (2 * of_a_text + 100)))
    assert sampler.draw(prompts) == wanted
    assert rows == [2, 2]


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {"max_new_tokens": 3}, "at least one"),
        ([300], {"max_new_tokens": 3}, r"\[0, 300\)"),
        ([1], {"max_new_tokens": 32}, r"max_new_tokens=32 do not fit in model.max_seq_len=32: ask for 1 to 31"),
        ([1] * 32, {"max_new_tokens": 1}, r"model.max_seq_len=32: shorten the prompt$"),
        ([1], {"max_new_tokens": 3, "temperature": -1.0}, "temperature=-1.0"),
        ([1], {"max_new_tokens": 3, "temperature": float("nan")}, "temperature=nan must be a number"),
        ([1], {"max_new_tokens": 3, "temperature": float("inf")}, "temperature=inf must be a number"),
        ([1], {"max_new_tokens": 3, "seed": 2**70}, r"seed=1180591620717411303424 must lie in"),
        ([1], {"max_new_tokens": 3, "top_k": 0}, "top_k=0"),
        ([1], {"max_new_tokens": 3, "top_p": 0.0}, r"top_p=0.0 must be null or lie in \(0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(
    params: Transformer, prompt: list[int], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(params, prompt, **arguments)
