"""Causal attention by name. Every implementation computes the same function; `resolve_attention` says which and why.

Names: `reference` (plain XLA, scores in f32), `blocked` (the same, without the blocks that the mask hides), `cudnn`
(see `grug_native.kernels.cudnn`), and levanter's `xla_flash`, `gpu_fa4_cute` and `tpu_splash`, which are imported when
they are asked for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal, cast, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from grug_native.kernels.backend import Backend, current_backend
from grug_native.kernels.choices import note_choice
from grug_native.kernels.cudnn import PackedRows, causal_attention, masked_attention, pack_rows, packed_attention
from grug_native.sharding import BATCH_AXES, explicit_mesh, out_sharding, reshard
from grug_native.types import AttentionMask

AttentionName = Literal["auto", "reference", "blocked", "xla_flash", "cudnn", "gpu_fa4_cute", "tpu_splash"]
"""An attention implementation; `auto` lets `resolve_attention` decide."""

ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)

WANTED_BACKEND: dict[AttentionName, str] = {"cudnn": "gpu", "gpu_fa4_cute": "gpu", "tpu_splash": "tpu"}
"""The implementations that only one backend has."""

_HOPPER = (9, 0)
"""Compute capability from which cuDNN has a packed layout, and heads of up to 256 features."""

_HIDDEN = -1e9
"""Score of a key that the mask hides: its weight is 0 in f32."""

_QUERY_BLOCK = 128
_MOST_QUERY_BLOCKS = 8
"""More blocks save less and less of the upper triangle, and take longer to compile."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What the choice of an implementation depends on."""

    seq_len: int
    """Positions of a sequence."""
    head_dim: int
    """Features of a head."""
    dtype: str
    """Dtype of queries, keys and values."""
    packed: bool
    """Whether the batch has segment ids."""
    window: bool = False
    """Whether a query sees only so many positions."""
    causal: bool = True
    """Whether later positions are hidden."""


def resolve_attention(name: AttentionName, shape: AttentionShape, backend: Backend) -> tuple[AttentionName, str]:
    """Resolves `auto`, and gives the reason in words.

    Args:
        name: what the config says.
        shape: of the inputs.
        backend: that computes.

    Raises:
        ValueError: if the implementation that the config names does not take such inputs on this backend.
    """
    wanted = WANTED_BACKEND.get(name, backend.name)
    if backend.name != wanted:
        raise ValueError(f"model.attention={name!r} runs on a {wanted}, not on a {backend.name}: use 'auto'")
    obstacle = _cudnn_obstacle(shape, backend)
    if name == "cudnn" and obstacle is not None:
        raise ValueError(f"model.attention='cudnn' does not serve here: {obstacle}. Use 'auto' or 'reference'")
    if name == "gpu_fa4_cute" and find_spec("cutlass") is None:
        raise ValueError(
            f"model.attention={name!r} needs the packages nvidia-cutlass-dsl[cu13] and flash-attn-4: install them, or "
            "use 'auto'"
        )
    if name != "auto":
        return name, "asked for by the config"
    if backend.name == "tpu" and shape.seq_len % 128 == 0:
        return "tpu_splash", "the TPU kernel, which skips masked blocks"
    if backend.name == "gpu" and obstacle is None:
        if not shape.packed:
            return "cudnn", "fused and O(S) in memory"
        if takes_packed_rows(shape, backend):
            return "cudnn", "its packed layout: fused, O(S) in memory, and a document costs by its own length"
        return "cudnn", "fused, with the documents as a mask of S x S: its packed layout needs Hopper and no window"
    why_not = f" (not cuDNN: {obstacle})" if backend.name == "gpu" else ""
    if backend.name != "tpu" and shape.seq_len > 2048:
        return "xla_flash", f"O(S) in memory where others would hold S x S scores{why_not}"
    if backend.name == "cpu":
        return "blocked", "dense products, less the blocks above the diagonal"
    return "reference", f"dense products; nothing faster takes such a batch on this backend{why_not}"


def _cudnn_obstacle(shape: AttentionShape, backend: Backend) -> str | None:
    """Why cuDNN's attention cannot be had, if it cannot; as `check_is_flash_attention` in `jax._src.cudnn` has it."""
    capability = backend.cuda_capability
    if capability is None or capability < (8, 0):
        return "it needs an NVIDIA GPU of the Ampere generation or later"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16, not in {shape.dtype}"
    largest = 256 if capability >= _HOPPER else 128
    if shape.head_dim % 8 != 0 or shape.head_dim > largest:
        return f"heads of {shape.head_dim} features are no multiple of 8 up to {largest}"
    if (shape.packed or not shape.causal) and shape.seq_len % 2 != 0:
        return f"with a mask it needs an even number of positions, not {shape.seq_len}"
    return None


def takes_packed_rows(shape: AttentionShape, backend: Backend) -> bool:
    """Whether cuDNN can be told where the documents are, and need not be given a mask."""
    hopper = backend.cuda_capability is not None and backend.cuda_capability >= _HOPPER
    return shape.packed and shape.causal and not shape.window and hopper


class Mask(eqx.Module):
    """A causal mask as levanter's, for whoever does without levanter, and with what a kernel wants to know of it."""

    segment_ids: tuple[Int[Array, "B S"], Int[Array, "B S"]] | None = None
    """As in `AttentionMask`."""
    rows: PackedRows | None = None
    """Where the documents are, worked out once for all layers."""
    is_causal: bool = eqx.field(static=True, default=True)
    """As in `AttentionMask`."""
    sliding_window: int | None = eqx.field(static=True, default=None)
    """As in `AttentionMask`."""


def with_window(mask: AttentionMask, window: int) -> Mask:
    """The mask of a layer in which a query sees only so many positions, itself included."""
    return Mask(segment_ids=mask.segment_ids, is_causal=mask.is_causal, sliding_window=window)


def prepare_mask(
    mask: AttentionMask, *, seq_len: int, head_dim: int, dtype: str, implementation: AttentionName
) -> AttentionMask:
    """The same mask, with what the implementation wants to know of it; to be called once, outside of the layers."""
    shape, backend = _shape(mask, seq_len=seq_len, head_dim=head_dim, dtype=dtype), current_backend()
    name, reason = resolve_attention(implementation, shape, backend)
    note_choice("attention", name, reason)
    if name != "cudnn" or not takes_packed_rows(shape, backend) or mask.segment_ids is None:
        return mask
    return Mask(mask.segment_ids, pack_rows(mask.segment_ids[0]))


def _shape(mask: AttentionMask, *, seq_len: int, head_dim: int, dtype: str) -> AttentionShape:
    return AttentionShape(
        seq_len=seq_len,
        head_dim=head_dim,
        dtype=dtype,
        packed=mask.segment_ids is not None,
        window=mask.sliding_window is not None,
        causal=mask.is_causal,
    )


def visible(
    mask: AttentionMask,
    queries: Int[Array, " Q"],
    keys: Int[Array, " K"],
    segment_ids: tuple[Int[Array, "B Q"], Int[Array, "B K"]] | None,
) -> Bool[Array, "#B Q K"]:
    """A mask as booleans, True where attention is allowed; one row where there are no segment ids.

    Args:
        mask: causality and window.
        queries: positions of the queries.
        keys: positions of the keys.
        segment_ids: documents of both.
    """
    query, key = queries[:, None], keys[None, :]
    allowed = jnp.ones((queries.size, keys.size), bool)
    if mask.is_causal:
        allowed &= key <= query
    if mask.sliding_window is not None:
        allowed &= key > query - mask.sliding_window
    if segment_ids is None:
        return allowed[None]
    return allowed & (segment_ids[0][:, :, None] == segment_ids[1][:, None, :])


def dense_mask(mask: AttentionMask, queries: range, keys: range) -> Bool[Array, "#B Q K"]:
    """`visible` of some positions of a sequence."""
    segment_ids = mask.segment_ids
    if segment_ids is not None:
        own, other = segment_ids
        segment_ids = own[:, queries.start : queries.stop], other[:, keys.start : keys.stop]
    query, key = (jnp.arange(these.start, these.stop) for these in (queries, keys))
    return visible(mask, query, key, segment_ids)


def attend(
    q: Float[Array, "B S H E"], k: Float[Array, "B N K E"], v: Float[Array, "B N K E"], seen: Bool[Array, "#B S K"]
) -> Float[Array, "B S H E"]:
    """Softmax attention with grouped query heads, scores and softmax in f32. Keys and values have their heads first.

    References:
        Vaswani et al. 2017 (arXiv 1706.03762), equation 1; Ainslie et al. 2023 (arXiv 2305.13245) for grouped queries.
    """
    grouped = _group_heads(q, k.shape[1])
    scores = jnp.einsum("bsnge,bnke->bngsk", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _merge_groups(jnp.einsum("bngsk,bnke->bsnge", weights, v))


def reference_attention(
    q: Float[Array, "B S H E"], k: Float[Array, "B S N E"], v: Float[Array, "B S N E"], mask: AttentionMask
) -> Float[Array, "B S H E"]:
    """`attend` with all scores in memory at once."""
    positions = range(q.shape[1])
    return attend(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), dense_mask(mask, positions, positions))


def blocked_attention(
    q: Float[Array, "B S H E"], k: Float[Array, "B S N E"], v: Float[Array, "B S N E"], mask: AttentionMask
) -> Float[Array, "B S H E"]:
    """`reference_attention`, one block of queries after the other, each over the keys that the mask can let it see.

    With a causal mask that is little more than half of the scores. A block's scores also stay in the cache between the
    products, and the division of the softmax is done after the second one, on `E` numbers a query and not on `S`.
    """
    seq_len = q.shape[1]
    block = max(_QUERY_BLOCK, seq_len // _MOST_QUERY_BLOCKS)
    grouped = jnp.transpose(_group_heads(q, k.shape[2]), (0, 2, 3, 1, 4))
    k, v = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k, v))
    contexts: list[Float[Array, "B N G block E"]] = []
    for start in range(0, seq_len, block):
        queries = range(start, min(start + block, seq_len))
        first = 0 if mask.sliding_window is None else max(0, start - mask.sliding_window + 1)
        keys = range(first, queries.stop if mask.is_causal else seq_len)
        k_seen, v_seen = (x[:, :, keys.start : keys.stop] for x in (k, v))
        scores = jnp.einsum(
            "bngse,bnke->bngsk",
            grouped[:, :, :, queries.start : queries.stop],
            k_seen,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(dense_mask(mask, queries, keys)[:, None, None], scores, _HIDDEN)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        context = jnp.einsum("bngsk,bnke->bngse", weights.astype(v.dtype), v_seen, preferred_element_type=jnp.float32)
        contexts.append((context / total).astype(v.dtype))
    return _merge_groups(jnp.transpose(jnp.concatenate(contexts, axis=3), (0, 3, 1, 2, 4)))


def _group_heads(q: Float[Array, "B S H E"], num_kv_heads: int) -> Float[Array, "B S N G E"]:
    """The queries by the key/value head that serves them, scaled by `1 / sqrt(E)`."""
    batch, seq_len, num_heads, head_dim = q.shape
    shape = (batch, seq_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    spec = out_sharding(BATCH_AXES, None, "model", None, None)
    return jnp.reshape(q, shape, out_sharding=spec) / math.sqrt(head_dim)


def _merge_groups(context: Float[Array, "B S N G E"]) -> Float[Array, "B S H E"]:
    batch, seq_len, num_kv_heads, groups, head_dim = context.shape
    shape = (batch, seq_len, num_kv_heads * groups, head_dim)
    return jnp.reshape(context, shape, out_sharding=out_sharding(BATCH_AXES, None, "model", None))


def _cudnn_attention(
    q: Float[Array, "B S H E"], k: Float[Array, "B S N E"], v: Float[Array, "B S N E"], mask: AttentionMask
) -> Float[Array, "B S H E"]:
    if isinstance(mask, Mask) and mask.rows is not None and mask.segment_ids is not None:
        return _per_shard(packed_attention, q, k, v, mask.segment_ids[0], mask.rows)
    if mask.segment_ids is None and mask.is_causal:
        return _per_shard(partial(causal_attention, window=mask.sliding_window), q, k, v)
    positions = range(q.shape[1])
    dense = dense_mask(mask, positions, positions)
    dense = jnp.broadcast_to(dense, (q.shape[0], *dense.shape[1:]), out_sharding=out_sharding(BATCH_AXES, None, None))
    return _per_shard(partial(masked_attention, is_causal=mask.is_causal), q, k, v, dense)


def _per_shard(
    function: Callable[..., Array],
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S N E"],
    v: Float[Array, "B S N E"],
    *of_batch: PyTree[Array],
) -> Float[Array, "B S H E"]:
    """Runs a kernel that knows nothing of meshes on each device's sequences and heads.

    Without this, what it returns carries no sharding under an explicit mesh, and its gradient cannot be reshaped.
    """
    if not explicit_mesh():
        return function(q, k, v, *of_batch)
    heads, rows = PartitionSpec(BATCH_AXES, None, "model", None), PartitionSpec(BATCH_AXES)
    in_specs = (heads, heads, heads, *(rows for _ in of_batch))
    placed = jax.tree.map(lambda x: reshard(x, BATCH_AXES, *(None for _ in x.shape[1:])), of_batch)
    return jax.shard_map(function, in_specs=in_specs, out_specs=heads, check_vma=False)(q, k, v, *placed)


def attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S N E"],
    v: Float[Array, "B S N E"],
    mask: AttentionMask,
    *,
    implementation: AttentionName = "auto",
) -> Float[Array, "B S H E"]:
    """Attention of `q` over `k` and `v` under `mask`, by the named implementation.

    Raises:
        ValueError: if it does not take such inputs on this backend.
    """
    seq_len, head_dim, dtype = q.shape[1], q.shape[-1], q.dtype.name
    shape = _shape(mask, seq_len=seq_len, head_dim=head_dim, dtype=dtype)
    name, _ = resolve_attention(implementation, shape, current_backend())
    if name == "reference":
        return reference_attention(q, k, v, mask)
    if name == "blocked":
        return blocked_attention(q, k, v, mask)
    if name == "cudnn":
        if not (isinstance(mask, Mask) and mask.rows is not None):
            mask = prepare_mask(mask, seq_len=seq_len, head_dim=head_dim, dtype=dtype, implementation=implementation)
        return _cudnn_attention(q, k, v, mask)
    from levanter.grug import attention as levanter_attention

    grug_mask = levanter_attention.AttentionMask(mask.is_causal, mask.segment_ids, mask.sliding_window)
    kernel = cast(levanter_attention.GrugAttentionImplementation, name)
    return levanter_attention.attention(q, k, v, grug_mask, implementation=kernel)
