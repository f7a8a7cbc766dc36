"""cuDNN's attention, for rows of several documents too.

cuDNN has a packed layout: the documents of a batch lie one after the other, and it is told where each starts and how
long it is. JAX has this layout in a private module only (jax issue 29731): what we use of that stands here, and nowhere
else. The layout is worked out once a step, and not once a layer as JAX would do it.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Bool, Float, Int

from grug_native.sharding import BATCH_AXES, explicit_mesh, reshard

# JAX's own functions over them would move the documents to the front in each layer, forward and backward.
_FORWARD = fused._dot_product_attention_fwd_p  # pyright: ignore[reportPrivateUsage]
_BACKWARD = fused._dot_product_attention_bwd_p  # pyright: ignore[reportPrivateUsage]

DOCUMENTS_PER_ROW = 32
"""Room for so many documents a row, on the average over the rows of a device; each costs memory for its softmax."""


class PackedRows(eqx.Module):
    """Where the documents of a batch are, as cuDNN wants it. Each device has a layout of its own rows.

    A document is a run of equal segment ids in a row. The documents of all rows stand one after the other, in the first
    places of the arrays; the shapes say only how much room there is.
    """

    starts: Int[Array, "B M_plus_1"]
    """Position of each document's first token in the device's flattened rows; then the number of its tokens."""
    lengths: Int[Array, "B M"]
    """Tokens of each document; then zeros."""
    fits: Bool[Array, " shards"]
    """Whether there is room for all documents, and none comes back in its row after another one."""


def pack_rows(segment_ids: Int[Array, "B S"]) -> PackedRows:
    """Works the layout out, on each device for its own rows.

    Args:
        segment_ids: of queries and keys alike.
    """
    if not explicit_mesh():
        return _pack_rows(segment_ids)
    rows = jax.P(BATCH_AXES)
    mapped = jax.shard_map(_pack_rows, in_specs=rows, out_specs=rows, check_vma=False)
    return mapped(reshard(segment_ids, BATCH_AXES, None))


def _pack_rows(segment_ids: Int[Array, "B S"]) -> PackedRows:
    batch, seq_len = segment_ids.shape
    room, tokens = batch * DOCUMENTS_PER_ROW, batch * seq_len
    first = jnp.ones((batch, 1), bool)
    begins = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1).reshape(-1)
    starts = jnp.nonzero(begins, size=room + batch, fill_value=tokens)[0].astype(jnp.int32)
    lengths = jnp.diff(starts, append=tokens)[:room]
    # Two documents of one row with the same id are one document in two parts, which the kernel cannot say.
    of_document = segment_ids.reshape(-1).at[starts].get(mode="fill", fill_value=0)
    rows, ids = jax.lax.sort((starts // seq_len, of_document), num_keys=2)
    comes_back = jnp.any((rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1]) & (rows[1:] < batch))
    fits = (jnp.sum(begins) <= room) & ~comes_back
    return PackedRows(
        starts=starts.reshape(batch, DOCUMENTS_PER_ROW + 1),
        lengths=lengths.reshape(batch, DOCUMENTS_PER_ROW),
        fits=fits[None],
    )


def causal_attention(
    q: Float[Array, "B S H E"], k: Float[Array, "B S N E"], v: Float[Array, "B S N E"], *, window: int | None
) -> Float[Array, "B S H E"]:
    """Attention to all earlier positions, or to the last `window`, each one itself included."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
        scale=1 / math.sqrt(q.shape[-1]),
    )


def masked_attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S N E"],
    v: Float[Array, "B S N E"],
    mask: Bool[Array, "#B S K"],
    *,
    is_causal: bool,
) -> Float[Array, "B S H E"]:
    """Attention where `mask` allows it: the scores are never in memory, the mask is, as (B, 1, S, S) numbers.

    With `is_causal`, of `mask` only what lies on and below the diagonal is looked at.
    """
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], is_causal=is_causal, implementation="cudnn", scale=1 / math.sqrt(q.shape[-1])
    )


def packed_attention(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S N E"],
    v: Float[Array, "B S N E"],
    segment_ids: Int[Array, "B S"],
    rows: PackedRows,
) -> Float[Array, "B S H E"]:
    """Causal attention inside of each document, by the packed layout; where `rows` do not fit, by a mask.

    Under an explicit mesh this runs inside a `shard_map`: the arguments are those of one device.
    """
    if q.size >= 2**31:  # cuDNN counts the numbers before a document in 32 bits.
        return _masked(q, k, v, segment_ids)
    return _packed(q, k, v, segment_ids, rows)


def _masked(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    return masked_attention(q, k, v, segment_ids[:, :, None] == segment_ids[:, None, :], is_causal=True)


@jax.custom_vjp
def _packed(q: Array, k: Array, v: Array, segment_ids: Array, rows: PackedRows) -> Array:
    return jax.lax.cond(
        rows.fits[0],
        lambda: _bind_forward(q, k, v, rows, is_training=False)[0],
        lambda: _masked(q, k, v, segment_ids),
    )


type _Residuals = tuple[Array, Array, Array, Array, PackedRows, Array, Array]


def _packed_forward(q: Array, k: Array, v: Array, segment_ids: Array, rows: PackedRows) -> tuple[Array, _Residuals]:
    def masked() -> tuple[Array, Array]:
        statistics = jnp.zeros((rows.lengths.size, q.shape[2], q.shape[1]), jnp.float32)
        return _masked(q, k, v, segment_ids), statistics

    context, statistics = jax.lax.cond(rows.fits[0], lambda: _bind_forward(q, k, v, rows, is_training=True), masked)
    return context, (q, k, v, segment_ids, rows, context, statistics)


def _packed_backward(residuals: _Residuals, cotangent: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, segment_ids, rows, context, statistics = residuals

    def masked() -> tuple[Array, Array, Array]:
        return jax.vjp(lambda q, k, v: _masked(q, k, v, segment_ids), q, k, v)[1](cotangent)

    def packed() -> tuple[Array, Array, Array]:
        operands = (*_operands(q, k, v, rows), statistics, context, cotangent)
        d_q, d_k, d_v = _BACKWARD.bind(*operands, **_settings(q))
        return d_q, d_k, d_v

    return *jax.lax.cond(rows.fits[0], packed, masked), None, None


_packed.defvjp(_packed_forward, _packed_backward)


def _bind_forward(q: Array, k: Array, v: Array, rows: PackedRows, *, is_training: bool) -> tuple[Array, ...]:
    """The context; and in training the softmax's statistics, which the backward pass needs."""
    operands = _operands(q, k, v, rows)
    return tuple(_FORWARD.bind(*operands, **_settings(q), is_training=is_training))


def _operands(q: Array, k: Array, v: Array, rows: PackedRows) -> tuple[Array, ...]:
    """Bias and page tables are unused; offsets count numbers, not tokens."""
    unused = jnp.zeros(0, q.dtype)
    offsets = (rows.starts * math.prod(x.shape[2:]) for x in (q, k))
    return (q, k, v, unused, rows.lengths, rows.lengths, *offsets, unused, unused)


def _settings(q: Array) -> dict[str, object]:
    return {
        "scale": 1 / math.sqrt(q.shape[-1]),
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": fused.MaskType.PADDING_CAUSAL,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
