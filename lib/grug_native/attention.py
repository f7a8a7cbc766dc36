"""Causal attention by name. Every implementation computes the same function; `choose_attention` says which one and why.

Names: `reference` (plain XLA, scores in f32), `cudnn` (`jax.nn.dot_product_attention`), and levanter's `xla_flash`,
`gpu_fa4_cute` and `tpu_splash`, which are imported when they are asked for.
"""

import math
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grug_native.mesh import BATCH_AXES, out_sharding
from grug_native.types import AttentionMask

AttentionName = Literal["auto", "reference", "xla_flash", "cudnn", "gpu_fa4_cute", "tpu_splash"]
"""An attention implementation; `auto` lets `choose_attention` decide."""

ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)


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
        return "xla_flash", "O(S) in memory where the reference would hold S x S scores"
    return "reference", "dense products are fastest at this length on this backend"


def dense_mask(mask: AttentionMask, seq_len: int) -> Bool[Array, "#B S S"]:
    """The mask as booleans, True where attention is allowed; one row when no segment ids tell rows apart."""
    query, key = jnp.arange(seq_len)[:, None], jnp.arange(seq_len)[None, :]
    allowed = jnp.ones((seq_len, seq_len), bool)
    if mask.is_causal:
        allowed &= key <= query
    if mask.sliding_window is not None:
        allowed &= key > query - mask.sliding_window
    if mask.segment_ids is None:
        return allowed[None]
    q_segments, k_segments = mask.segment_ids
    return allowed & (q_segments[:, :, None] == k_segments[:, None, :])


def reference_attention(
    q: Float[Array, "B S H E"], k: Float[Array, "B S N E"], v: Float[Array, "B S N E"], mask: AttentionMask
) -> Float[Array, "B S H E"]:
    """Softmax attention with grouped query heads, scores and softmax in f32.

    References:
        Vaswani et al. 2017 (arXiv 1706.03762), equation 1; Ainslie et al. 2023 (arXiv 2305.13245) for grouped queries.
    """
    batch, seq_len, num_heads, head_dim = q.shape
    groups = num_heads // k.shape[2]
    spec = (BATCH_AXES, None, "model", None, None)
    grouped = jnp.reshape(q, (batch, seq_len, k.shape[2], groups, head_dim), out_sharding=out_sharding(*spec))
    scores = jnp.einsum("bsnge,bkne->bngsk", grouped / math.sqrt(head_dim), k, preferred_element_type=jnp.float32)
    scores = jnp.where(dense_mask(mask, seq_len)[:, None, None], scores, -1e9)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    context = jnp.einsum("bngsk,bkne->bsnge", weights, v)
    return jnp.reshape(context, q.shape, out_sharding=out_sharding(BATCH_AXES, None, "model", None))


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
    if name == "cudnn":
        return _cudnn_attention(q, k, v, mask)
    from levanter.grug import attention as levanter_attention

    grug_mask = cast(levanter_attention.AttentionMask, mask)
    kernel = cast(levanter_attention.GrugAttentionImplementation, name)
    return levanter_attention.attention(q, k, v, grug_mask, implementation=kernel)
