"""Causal attention by name. Every implementation computes the same function; `choose_attention` says which one and why.

Names: `reference` (plain XLA, scores in f32), `blocked` (the same, without the blocks that the mask hides), `cudnn`
(`jax.nn.dot_product_attention`), and levanter's `xla_flash`, `gpu_fa4_cute` and `tpu_splash`, which are imported when
they are asked for.
"""

import math
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grug_native.mesh import BATCH_AXES, out_sharding
from grug_native.types import AttentionMask

AttentionName = Literal["auto", "reference", "blocked", "xla_flash", "cudnn", "gpu_fa4_cute", "tpu_splash"]
"""An attention implementation; `auto` lets `choose_attention` decide."""

ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)

_HIDDEN = -1e9
"""Score of a key that the mask hides: its weight is 0 in f32."""

_QUERY_BLOCK = 128
_MOST_QUERY_BLOCKS = 8
"""More blocks save less and less of the upper triangle, and take longer to compile."""


def choose_attention(name: AttentionName, *, backend: str, seq_len: int, packed: bool) -> tuple[AttentionName, str]:
    """Resolves `auto`, and gives the reason in words.

    Args:
        name: what the config says.
        backend: `jax.default_backend()`.
        seq_len: positions of a sequence.
        packed: whether the batch has segment ids.
    """
    if name != "auto":
        return name, "asked for by the config"
    if backend == "tpu" and seq_len % 128 == 0:
        return "tpu_splash", "the TPU kernel, which skips masked blocks"
    if backend == "gpu" and not packed:
        return "cudnn", "fused and O(S) in memory; takes no segment ids"
    if backend != "tpu" and seq_len > 2048:
        return "xla_flash", "O(S) in memory where others would hold S x S scores"
    if backend == "cpu":
        return "blocked", "dense products, less the blocks above the diagonal"
    return "reference", "dense products; nothing faster for such a batch has been measured on this backend"


def dense_mask(mask: AttentionMask, queries: range, keys: range) -> Bool[Array, "#B Q K"]:
    """The mask of some positions as booleans, True where attention is allowed; one row where there are no segment ids.

    Args:
        mask: who may attend to whom.
        queries: positions of the queries.
        keys: positions of the keys.
    """
    query, key = jnp.arange(queries.start, queries.stop)[:, None], jnp.arange(keys.start, keys.stop)[None, :]
    allowed = jnp.ones((len(queries), len(keys)), bool)
    if mask.is_causal:
        allowed &= key <= query
    if mask.sliding_window is not None:
        allowed &= key > query - mask.sliding_window
    if mask.segment_ids is None:
        return allowed[None]
    q_segments, k_segments = mask.segment_ids
    q_segments, k_segments = q_segments[:, queries.start : queries.stop], k_segments[:, keys.start : keys.stop]
    return allowed & (q_segments[:, :, None] == k_segments[:, None, :])


def reference_attention(
    q: Float[Array, "B S H E"], k: Float[Array, "B S N E"], v: Float[Array, "B S N E"], mask: AttentionMask
) -> Float[Array, "B S H E"]:
    """Softmax attention with grouped query heads, scores and softmax in f32.

    References:
        Vaswani et al. 2017 (arXiv 1706.03762), equation 1; Ainslie et al. 2023 (arXiv 2305.13245) for grouped queries.
    """
    grouped = _group_heads(q, k.shape[2])
    positions = range(q.shape[1])
    scores = jnp.einsum("bsnge,bkne->bngsk", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(dense_mask(mask, positions, positions)[:, None, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    context = jnp.einsum("bngsk,bkne->bsnge", weights, v)
    return _merge_groups(context)


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
    if mask.segment_ids is not None or not mask.is_causal:
        raise ValueError("attention='cudnn' takes causal masks without segment ids: use 'reference' or 'gpu_fa4_cute'")
    window = None if mask.sliding_window is None else (mask.sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=window, implementation="cudnn", scale=1 / math.sqrt(q.shape[-1])
    )


def attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S N E"],
    v: Float[Array, "B S N E"],
    mask: AttentionMask,
    *,
    implementation: AttentionName = "auto",
) -> Float[Array, "B S H E"]:
    """Attention of `q` over `k` and `v` under `mask`, by the named implementation."""
    name, _ = choose_attention(
        implementation, backend=jax.default_backend(), seq_len=q.shape[1], packed=mask.segment_ids is not None
    )
    if name == "reference":
        return reference_attention(q, k, v, mask)
    if name == "blocked":
        return blocked_attention(q, k, v, mask)
    if name == "cudnn":
        return _cudnn_attention(q, k, v, mask)
    from levanter.grug import attention as levanter_attention

    grug_mask = cast(levanter_attention.AttentionMask, mask)
    kernel = cast(levanter_attention.GrugAttentionImplementation, name)
    return levanter_attention.attention(q, k, v, grug_mask, implementation=kernel)
