from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from levanter.grug.attention import AttentionMask
from levanter.grug.attention import reference_attention as levanter_reference

from grug_native.attention import AttentionName, AttentionShape, attention, dense_mask, resolve_attention
from grug_native.kernels.backend import Backend
from grug_native.sharding import BATCH_AXES, MeshAxes, create_mesh
from tests.accelerators import AMPERE, CPU, HOPPER, TPU, TURING
from tests.fixtures_run import make_batch
from tests.tolerance import assert_close, assert_trees_close


def qkv(seq_len: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = jax.random.split(jax.random.key(0), 3)
    shape = (4, seq_len)
    return (
        jax.random.normal(q, (*shape, 4, 8)),
        jax.random.normal(k, (*shape, 2, 8)),
        jax.random.normal(v, (*shape, 2, 8)),
    )


MASKS = {
    "causal": AttentionMask.causal(),
    "window": AttentionMask.causal(sliding_window=5),
    "all": AttentionMask(),
}

LONG = 300
"""Positions that make two whole blocks of queries and a part of one."""


type Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def with_gradient(attend: Attend, seq_len: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """What it gives, and the gradients for a cotangent that is drawn."""

    @jax.jit
    def run(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, pull = jax.vjp(attend, *inputs)
        return out, pull(jax.random.normal(jax.random.key(1), out.shape))

    return run(qkv(seq_len))


@pytest.mark.parametrize("kind", [*MASKS, "packed"])
def test_reference_equals_levanters_with_its_gradient(kind: str) -> None:
    mask = make_batch(packed=True).attn_mask if kind == "packed" else MASKS[kind]
    ours = with_gradient(partial(attention, mask=mask, implementation="reference"), 32)
    theirs = with_gradient(partial(levanter_reference, mask=mask, logits_dtype=jnp.float32), 32)
    assert_close(ours[0], theirs[0], terms=8 + 2 * 32)
    assert_trees_close(ours[1], theirs[1], terms=2 * (8 + 2 * 32))


@pytest.mark.parametrize("kind", [*MASKS, "packed"])
def test_blocked_equals_the_reference_with_its_gradient(kind: str) -> None:
    mask = make_batch(packed=True, seq_len=LONG).attn_mask if kind == "packed" else MASKS[kind]
    ours = with_gradient(partial(attention, mask=mask, implementation="blocked"), LONG)
    whole = with_gradient(partial(attention, mask=mask, implementation="reference"), LONG)
    assert_close(ours[0], whole[0], terms=8 + 2 * LONG)
    assert_trees_close(ours[1], whole[1], terms=2 * (8 + 2 * LONG))


def test_blocked_leaves_out_what_a_causal_mask_hides() -> None:
    def operations(implementation: AttentionName) -> float:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, AttentionMask.causal(), implementation=implementation)

        analysis = jax.jit(run).lower(*qkv(1024)).cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    assert operations("blocked") < 0.6 * operations("reference")


@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_a_mesh_changes_nothing(name: AttentionName) -> None:
    inputs, mask = qkv(LONG), make_batch(packed=True, seq_len=LONG).attn_mask
    alone = attention(*inputs, mask, implementation=name)
    with jax.set_mesh(create_mesh(4, MeshAxes(data=2, model=2))):
        spec = jax.P(BATCH_AXES, None, "model", None)
        q, k, v = (jax.device_put(x, spec) for x in inputs)
        found = eqx.filter_jit(attention)(q, k, v, mask, implementation=name)
    assert_close(found, alone, terms=8 + 2 * LONG)


@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_xla_flash_equals_the_reference(kind: str) -> None:
    mask = make_batch(packed=True, seq_len=2048).attn_mask if kind == "packed" else MASKS[kind]
    inputs, attend = qkv(2048), eqx.filter_jit(attention)
    reference = attend(*inputs, mask, implementation="reference")
    assert_close(attend(*inputs, mask, implementation="xla_flash"), reference, terms=8 + 2 * 2048)


def shape(
    *, seq_len: int = 1024, head_dim: int = 64, dtype: str = "bfloat16", packed: bool = False, window: bool = False
) -> AttentionShape:
    return AttentionShape(seq_len=seq_len, head_dim=head_dim, dtype=dtype, packed=packed, window=window)


@pytest.mark.parametrize(
    ("backend", "asked", "chosen", "words"),
    [
        (CPU, shape(), "blocked", "dense"),
        (CPU, shape(packed=True), "blocked", "dense"),
        (CPU, shape(seq_len=8192, packed=True), "xla_flash", "O(S)"),
        (HOPPER, shape(), "cudnn", "fused"),
        (HOPPER, shape(packed=True), "cudnn", "packed layout: fused"),
        (HOPPER, shape(packed=True, window=True), "cudnn", "as a mask"),
        (HOPPER, shape(head_dim=256), "cudnn", "fused"),
        (HOPPER, shape(dtype="float32"), "reference", "not in float32"),
        (HOPPER, shape(head_dim=36, seq_len=4096), "xla_flash", "36 features"),
        (AMPERE, shape(packed=True), "cudnn", "as a mask"),
        (AMPERE, shape(packed=True, seq_len=1023), "reference", "even number"),
        (AMPERE, shape(head_dim=256), "reference", "up to 128"),
        (TURING, shape(packed=True), "reference", "Ampere"),
        (TPU, shape(seq_len=2048, packed=True), "tpu_splash", "TPU"),
        (TPU, shape(seq_len=100, packed=True), "reference", "dense"),
    ],
)
def test_auto_chooses_by_backend_and_shape(
    backend: Backend, asked: AttentionShape, chosen: AttentionName, words: str
) -> None:
    name, reason = resolve_attention("auto", asked, backend)
    assert name == chosen and words in reason


def test_a_name_is_obeyed() -> None:
    assert resolve_attention("xla_flash", shape(), CPU) == ("xla_flash", "asked for by the config")


@pytest.mark.parametrize(
    ("name", "backend", "words"),
    [
        ("cudnn", CPU, ["model.attention='cudnn'", "gpu, not on a cpu", "'auto'"]),
        ("cudnn", TURING, ["model.attention='cudnn'", "NVIDIA GPU", "'reference'"]),
        ("tpu_splash", HOPPER, ["model.attention='tpu_splash'", "tpu, not on a gpu", "'auto'"]),
        ("gpu_fa4_cute", CPU, ["model.attention='gpu_fa4_cute'", "gpu, not on a cpu", "'auto'"]),
        ("gpu_fa4_cute", HOPPER, ["model.attention='gpu_fa4_cute'", "flash-attn-4", "'auto'"]),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused(name: AttentionName, backend: Backend, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        resolve_attention(name, shape(), backend)
    assert all(word in str(error.value) for word in words)


def test_dense_mask_says_who_sees_whom() -> None:
    mask = AttentionMask.causal(sliding_window=2).with_segment_ids(jnp.array([[0, 0, 1, 1]]))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(dense_mask(mask, range(4), range(4))[0], np.array(expected, bool))
    np.testing.assert_array_equal(dense_mask(mask, range(1, 3), range(2))[0], np.array([[1, 1], [0, 0]], bool))
