from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from grug_native.attention import Mask
from grug_native.evaluation.generate import generate, on_one_device
from grug_native.language_model import logits, shard_parameters
from grug_native.model import Transformer
from grug_native.sharding import create_mesh
from tests.fixtures_run import SMALL_MODEL, llama

PROMPT = [7, 250, 3, 99, 12]


@pytest.fixture(scope="module")
def params() -> Transformer:
    """Weights large enough that the logits differ by more than rounding."""
    drawn = Transformer.init(SMALL_MODEL, key=jax.random.key(1))
    return jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, drawn)


@eqx.filter_jit
def full_logits(params: Transformer, tokens: Array) -> Float[Array, "B S V"]:
    return logits(params, tokens, Mask())


def by_hand(params: Transformer, new: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(new):
        padded = jnp.array([ids + [0] * (32 - len(ids))])
        ids.append(int(jnp.argmax(full_logits(params, padded)[0, len(ids) - 1])))
    return ids[len(PROMPT) :]


def test_temperature_0_takes_the_likeliest_token_of_the_full_forward_pass(params: Transformer) -> None:
    assert generate(params, PROMPT, max_new_tokens=27, temperature=0.0) == by_hand(params, 27)
    assert generate(params, PROMPT, max_new_tokens=9, top_k=1, seed=5) == by_hand(params, 9)


def test_a_mesh_changes_nothing(params: Transformer) -> None:
    alone = generate(params, PROMPT, max_new_tokens=20, seed=3)
    mesh = create_mesh(4)
    with jax.set_mesh(mesh):
        spread = jax.jit(shard_parameters)(params)
        assert len(spread.embed.sharding.device_set) == 4
        assert generate(spread, PROMPT, max_new_tokens=20, seed=3) == alone
    assert generate(spread, PROMPT, max_new_tokens=20, seed=3) == alone
    local = on_one_device(spread)
    assert generate(local, PROMPT, max_new_tokens=20, seed=3) == alone
    assert llama(on_one_device(local)).embed.unsafe_buffer_pointer() == llama(local).embed.unsafe_buffer_pointer()


def test_the_seed_decides(params: Transformer) -> None:
    drawn = [generate(params, PROMPT, max_new_tokens=20, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # A longer text begins as the shorter one did.
    assert generate(params, PROMPT, max_new_tokens=10, seed=0) == drawn[0][:10]


def test_draws_are_distributed_as_the_softmax_says(params: Transformer) -> None:
    logits = full_logits(params, jnp.array([PROMPT]))[0, -1] / 0.7
    top = jax.lax.top_k(logits, 4)[1].tolist()
    wanted = jax.nn.softmax(logits[jnp.array(top)])
    drawn = [generate(params, PROMPT, max_new_tokens=1, temperature=0.7, top_k=4, seed=s)[0] for s in range(200)]
    assert set(drawn) <= set(top)
    found = np.array([drawn.count(token) / 200 for token in top])
    assert (np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 200)).all()  # four standard deviations


def test_the_stop_token_ends_the_text_and_is_left_out(params: Transformer) -> None:
    whole = by_hand(params, 12)
    stop = whole[6]
    found = generate(params, PROMPT, max_new_tokens=12, temperature=0.0, stop_token=stop)
    assert found == whole[: whole.index(stop)]


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
    ],
)
def test_what_cannot_be_is_refused(
    params: Transformer, prompt: list[int], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(params, prompt, **arguments)
