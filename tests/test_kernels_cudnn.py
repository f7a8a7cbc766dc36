"""Where the documents of a batch are; and the path around cuDNN's kernels, with the kernels' own work done by us."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array
from levanter.grug.attention import AttentionMask

from grug_native import attention as attention_module
from grug_native.attention import AttentionName, attention, reference_attention
from grug_native.kernels import cudnn
from grug_native.kernels.backend import current_backend
from grug_native.kernels.cudnn import DOCUMENTS_PER_ROW, pack_rows
from grug_native.sharding import BATCH_AXES, MeshAxes, create_mesh
from tests.accelerators import HOPPER, pretend

SEQ_LEN = 128

ROWS: dict[str, list[list[int]]] = {
    "two documents a row": [[40, 88], [1, 127]],
    "one document a row": [[128], [128]],
    "documents that end at a block's edge": [[64, 64], [128]],
    "one-token documents": [[1] * 20 + [108], [107, *[1] * 21]],
    "more documents than there is room for": [[1] * 128, [2] * 64],
    "room lent by another row": [[2] * 60 + [8], [128]],
}
"""Lengths of the documents of two rows."""


def segment_ids(rows: list[list[int]]) -> np.ndarray:
    return np.array([np.repeat(np.arange(len(row)), row) for row in rows], np.int32)


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_the_layout_says_where_each_run_of_ids_is(rows: list[list[int]]) -> None:
    ids = np.array(rows)
    packed = jax.jit(pack_rows)(jnp.asarray(ids))
    edges = [(b * 6 + s) for b in range(len(rows)) for s in range(6) if s == 0 or ids[b, s] != ids[b, s - 1]]
    starts, lengths = np.asarray(packed.starts).reshape(-1), np.asarray(packed.lengths).reshape(-1)
    assert starts[: len(edges)].tolist() == edges and (starts[len(edges) :] == ids.size).all()
    assert lengths[: len(edges)].tolist() == np.diff([*edges, ids.size]).tolist() and not lengths[len(edges) :].any()
    returning = any(np.count_nonzero(np.diff(row, prepend=-1)) > len(set(row)) for row in rows)
    assert bool(packed.fits[0]) == (not returning)


def test_more_documents_than_there_is_room_for_do_not_fit() -> None:
    for documents, fits in ((DOCUMENTS_PER_ROW, True), (DOCUMENTS_PER_ROW + 1, False)):
        lengths = [*([1] * (documents - 1)), SEQ_LEN - documents + 1]
        assert bool(pack_rows(jnp.asarray(segment_ids([lengths]))).fits[0]) is fits


def _of_layout(q: Array, k: Array, v: Array, offsets: Array, lengths: Array) -> Array:
    """What cuDNN's packed layout means: causal attention inside of each document, which the layout alone names."""
    starts = offsets.reshape(-1)[: lengths.size] // math.prod(q.shape[2:])
    token = jnp.arange(q.shape[0] * q.shape[1])
    holds = (token[:, None] >= starts) & (token[:, None] < starts + lengths.reshape(-1))
    ids = jnp.where(jnp.any(holds, axis=1), jnp.argmax(holds, axis=1), -1).reshape(q.shape[:2])
    return reference_attention(q, k, v, AttentionMask.causal().with_segment_ids(ids))


class Kernel:
    """Stands in for one of cuDNN's kernels, which only a GPU has."""

    def __init__(self, run: Callable[..., tuple[Array, ...]]):
        self.run = run
        self.calls = 0

    def bind(self, *operands: Array, **settings: object) -> tuple[Array, ...]:
        self.calls += 1
        assert settings["variadic_args"] == (False, False)
        return self.run(*operands)


def _forward(*operands: Array) -> tuple[Array, ...]:
    q, k, v, _, lengths, _, offsets, *_ = operands
    statistics = jnp.zeros((lengths.size, q.shape[2], q.shape[1]), jnp.float32)
    return _of_layout(q, k, v, offsets, lengths), statistics


def _backward(*operands: Array) -> tuple[Array, ...]:
    q, k, v, _, lengths, _, offsets, *_, cotangent = operands
    return jax.vjp(lambda q, k, v: _of_layout(q, k, v, offsets, lengths), q, k, v)[1](cotangent)


def _masked(q: Array, k: Array, v: Array, mask: Array, *, is_causal: bool) -> Array:
    assert is_causal
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)) / math.sqrt(q.shape[-1])
    allowed = mask & jnp.tri(q.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhe->bqhe", weights, jnp.repeat(v, q.shape[2] // v.shape[2], axis=2))


def qkv(dtype: str = "float32") -> tuple[Array, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, SEQ_LEN, heads, 8)).astype(dtype) for key, heads in zip(keys, (4, 2, 2), strict=True)
    )
    return q, k, v


def both(implementation: AttentionName, mask: AttentionMask, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    """The context, and the gradients of something that depends on all of it."""

    def run(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        context = attention(q, k, v, mask, implementation=implementation)
        return jnp.sum(jnp.sin(context.astype(jnp.float32))), context

    gradients, context = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return context, gradients


@pytest.mark.parametrize("mesh", [None, MeshAxes(data=2, model=2)], ids=["one device", "data x model"])
@pytest.mark.parametrize("rows", ROWS)
def test_packed_rows_equal_the_reference_with_their_gradient(
    rows: str, mesh: MeshAxes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, inputs = AttentionMask.causal().with_segment_ids(jnp.asarray(segment_ids(ROWS[rows]))), qkv()
    expected = both("reference", mask, *inputs)
    forward, backward = Kernel(_forward), Kernel(_backward)
    monkeypatch.setattr(cudnn, "_FORWARD", forward)
    monkeypatch.setattr(cudnn, "_BACKWARD", backward)
    monkeypatch.setattr(cudnn, "masked_attention", _masked)
    # In f32, which cuDNN itself does not take: so the comparison is sharp.
    monkeypatch.setattr(attention_module, "_cudnn_obstacle", lambda *_: None)
    with pretend(HOPPER):
        if mesh is None:
            found = both("cudnn", mask, *inputs)
        else:
            with jax.set_mesh(create_mesh(2, mesh, devices=jax.devices()[:4])):
                heads = jax.P(BATCH_AXES, None, "model", None)
                found = both("cudnn", mask, *(jax.device_put(x, heads) for x in inputs))
    assert forward.calls and backward.calls
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(current_backend().cuda_capability is None, reason="cuDNN's kernels need an NVIDIA GPU")
@pytest.mark.parametrize("rows", ROWS)
def test_the_kernels_equal_the_reference_on_a_gpu(rows: str) -> None:
    mask, inputs = AttentionMask.causal().with_segment_ids(jnp.asarray(segment_ids(ROWS[rows]))), qkv("bfloat16")
    found, expected = both("cudnn", mask, *inputs), both("reference", mask, *inputs)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours.astype("float32"), theirs.astype("float32"), rtol=2e-2, atol=2e-2)
