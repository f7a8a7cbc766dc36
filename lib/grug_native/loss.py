"""Next-token cross-entropy over a `GrugLmExample`, without a scatter in its gradient, and the check of the batch.

Two implementations of one function, by name: `full` holds the logits of all tokens at once; `blockwise` holds those of
`BLOCK_TOKENS` tokens and computes the gradients in the forward pass, so that the logits are computed once.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from beartype import beartype
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float, Int, jaxtyped

from grug_native.backend import Backend, current_backend
from grug_native.mesh import BATCH_AXES, constrain, explicit_mesh, gather
from grug_native.model import Transformer, cast_parameters
from grug_native.model_config import CrossEntropyName
from grug_native.types import LmBatch, Scalar

ComputeDtype = Literal["float32", "bfloat16"]
"""Dtype of weights and activations inside the forward and backward pass; parameters stay in f32."""

BLOCK_TOKENS = 1024
"""Tokens whose logits the blockwise cross-entropy holds at a time, on each device of a CPU or TPU: near the cache."""

_MOST_BLOCK_TOKENS = 16_384
_LOGITS_SHARE = 1 / 16
_MOST_UNROLLED_BLOCKS = 8
"""Of a GPU. There the head's gradient is added up in memory once a block, and copied once a block by a loop: on an H200
a step of a 1.3B model took 332 ms or more with sixteen blocks, 322 with two. So blocks are as large as a share of the
memory lets their logits be, and where they are few there is no loop."""

FULL_LOGITS_BYTES = 2**28
"""Above this many bytes of f32 logits (and as many of their gradient), `auto` takes the blockwise implementation."""


def choose_cross_entropy(
    name: CrossEntropyName, *, backend: str, tokens: int, vocab_size: int
) -> tuple[CrossEntropyName, str]:
    """Resolves `auto`, and gives the reason in words.

    Args:
        name: what the config says.
        backend: `jax.default_backend()`.
        tokens: tokens of a batch, on one device.
        vocab_size: columns of the logits.
    """
    if name != "auto":
        return name, "asked for by the config"
    logits_bytes = 4 * tokens * vocab_size
    if logits_bytes > FULL_LOGITS_BYTES:
        return "blockwise", f"all logits at once would take {logits_bytes / 2**20:.0f} MiB a device"
    if backend == "cpu" and tokens > BLOCK_TOKENS:
        return "blockwise", "three matrix products where autodiff takes four, near the cache"
    return "full", f"all logits fit in {logits_bytes / 2**20:.0f} MiB a device"


def choose_block(tokens: int, vocab_size: int, backend: Backend) -> int:
    """Tokens of a block of the blockwise cross-entropy.

    The logits are f32 on every backend: their products add up in f32 anyway, and rounded to bf16 a logit of 16 would be
    off by up to 0.06, more than what the last tenth of a run improves.

    Args:
        tokens: of a batch, on one device.
        vocab_size: columns of the logits.
        backend: that computes.
    """
    if backend.name != "gpu" or backend.memory is None:
        return min(BLOCK_TOKENS, tokens)
    fitting = int(_LOGITS_SHARE * backend.memory) // (4 * vocab_size)
    block = min(_MOST_BLOCK_TOKENS, max(BLOCK_TOKENS, fitting // BLOCK_TOKENS * BLOCK_TOKENS))
    # Blocks of one size, so that none is filled up with tokens of no weight.
    return -(-tokens // -(-tokens // block))


@jaxtyped(typechecker=beartype)
def check_batch(
    tokens: Int[Array, "B S"],
    loss_weight: Float[Array, "B S"],
    query_segment_ids: Int[Array, "B S"] | None,
    key_segment_ids: Int[Array, "B S"] | None,
) -> None:
    """Checks shapes and dtypes of a batch's fields. It runs while a step is traced, so a running step pays nothing.

    Raises:
        jaxtyping.TypeCheckError: naming the field, the shape found and the shape wanted.
    """


def check_lm_batch(batch: LmBatch) -> None:
    """`check_batch` on the fields of a `GrugLmExample`."""
    check_batch(batch.tokens, batch.loss_weight, *(batch.attn_mask.segment_ids or (None, None)))


def per_token_loss(
    params: Transformer, batch: LmBatch, *, compute_dtype: ComputeDtype = "float32"
) -> Float[Array, "B S"]:
    """Nats of predicting `tokens[b, s + 1]` at position `s`, unweighted, in f32.

    The last position of each row predicts token 0: it means nothing, and `loss_weight` is 0 there.
    """
    check_lm_batch(batch)
    model = cast_parameters(params, compute_dtype)
    hidden, labels = model(batch.tokens, batch.attn_mask), next_tokens(batch.tokens)
    if _implementation(params, batch) == "full":
        return _full_losses(hidden, gather(model.lm_head, None, "model"), labels)[0]

    def local(
        hidden: Float[Array, "B S D"], head: Float[Array, "D V"], labels: Int[Array, "B S"]
    ) -> Float[Array, "B S"]:
        flat = _flatten(hidden, labels, jnp.ones(labels.shape, jnp.float32), head.shape[1])
        nats = jax.lax.map(lambda block: _block_losses(block[0], head, block[1])[0], flat[:2])
        return nats.reshape(-1)[: labels.size].reshape(labels.shape)

    return _per_shard(local, hidden, model.lm_head, labels)


def next_token_loss(
    params: Transformer, batch: LmBatch, *, z_loss_weight: float = 0.0, compute_dtype: ComputeDtype = "float32"
) -> Scalar:
    """Mean over the batch, weighted by `loss_weight`, of `-log p(next token) + z_loss_weight * logsumexp(logits)^2`.

    Zero where every weight is zero.

    References:
        The z-loss is that of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """
    check_lm_batch(batch)
    model = cast_parameters(params, compute_dtype)
    hidden, labels, weight = model(batch.tokens, batch.attn_mask), next_tokens(batch.tokens), batch.loss_weight
    if _implementation(params, batch) == "full":
        nats, log_z = _full_losses(hidden, gather(model.lm_head, None, "model"), labels)
        total = jnp.sum(weight * (nats + z_loss_weight * jnp.square(log_z)))
    else:

        def local(
            hidden: Float[Array, "B S D"],
            head: Float[Array, "D V"],
            labels: Int[Array, "B S"],
            weight: Float[Array, "B S"],
        ) -> Float[Array, "1 1"]:
            blocks = _flatten(hidden, labels, weight, head.shape[1])
            total: Array = _blockwise_total(z_loss_weight, *blocks, head)
            return total[None, None]

        total = jnp.sum(_per_shard(local, hidden, model.lm_head, labels, weight))
    weights = jnp.sum(weight)
    return jnp.where(weights > 0, total / jnp.where(weights > 0, weights, 1.0), 0.0)


def next_tokens(tokens: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """At each position the token after it, which it predicts; at the last one 0, which means nothing."""
    # Not `jnp.roll`: it loses the sharding of a batch of one sequence.
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))


def _implementation(params: Transformer, batch: LmBatch) -> CrossEntropyName:
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["replica_dcn"] * mesh.shape["data"]
    config = params.config
    name, _ = choose_cross_entropy(
        config.cross_entropy,
        backend=jax.default_backend(),
        tokens=batch.tokens.size // shards,
        vocab_size=config.vocab_size,
    )
    return name


def _full_losses(
    hidden: Float[Array, "B S D"], head: Float[Array, "D V"], labels: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Comparing with every column instead of indexing keeps a scatter out of the gradient: XLA:CPU runs it serially.
    is_label = labels[..., None] == jnp.arange(head.shape[1], dtype=labels.dtype)[None, None, :]
    return log_z - jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1), log_z


def _block_losses(
    hidden: Float[Array, "block D"], head: Float[Array, "D V"], labels: Int[Array, " block"]
) -> tuple[Float[Array, " block"], Float[Array, " block"], Float[Array, "block V"]]:
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    is_label = labels[:, None] == jnp.arange(head.shape[1], dtype=labels.dtype)[None, :]
    return log_z - jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1), log_z, logits


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise_total(
    z_loss_weight: float,
    hidden: Float[Array, "blocks block D"],
    labels: Int[Array, "blocks block"],
    weight: Float[Array, "blocks block"],
    head: Float[Array, "D V"],
) -> Scalar:
    def total_of(block: tuple[Array, Array, Array]) -> Scalar:
        nats, log_z, _ = _block_losses(block[0], head, block[1])
        return jnp.sum(block[2] * (nats + z_loss_weight * jnp.square(log_z)))

    return jnp.sum(jax.lax.map(total_of, (hidden, labels, weight)))


def _blockwise_forward(
    z_loss_weight: float,
    hidden: Float[Array, "blocks block D"],
    labels: Int[Array, "blocks block"],
    weight: Float[Array, "blocks block"],
    head: Float[Array, "D V"],
) -> tuple[Scalar, tuple[Array, Array, Array]]:
    """The total and its gradients for a unit cotangent: three matrix products a block where autodiff takes four."""

    def body(
        carry: tuple[Scalar, Float[Array, "D V"]], block: tuple[Array, Array, Array]
    ) -> tuple[tuple[Scalar, Float[Array, "D V"]], tuple[Array, Array]]:
        total, d_head = carry
        h, y, w = block
        nats, log_z, logits = _block_losses(h, head, y)
        terms = nats + z_loss_weight * jnp.square(log_z)
        is_label = y[:, None] == jnp.arange(head.shape[1], dtype=y.dtype)[None, :]
        probabilities = jnp.exp(logits - log_z[:, None])
        d_logits = (1 + 2 * z_loss_weight * log_z)[:, None] * probabilities - is_label
        d_logits = (w[:, None] * d_logits).astype(h.dtype)
        d_head = d_head + jnp.matmul(h.T, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(w * terms), d_head), (jnp.matmul(d_logits, head.T), terms)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    start = jax.tree.map(lambda x: _varying_like(x, hidden), start)
    blocks = hidden.shape[0]
    unrolled = current_backend().name == "gpu" and blocks <= _MOST_UNROLLED_BLOCKS
    (total, d_head), (d_hidden, d_weight) = jax.lax.scan(
        body, start, (hidden, labels, weight), unroll=blocks if unrolled else 1
    )
    return total, (d_hidden, d_weight, d_head.astype(head.dtype))


def _blockwise_backward(
    z_loss_weight: float, residuals: tuple[Array, Array, Array], cotangent: Scalar
) -> tuple[Array, None, Array, Array]:
    d_hidden, d_weight, d_head = (cotangent.astype(r.dtype) * r for r in residuals)
    return d_hidden, None, d_weight, d_head


_blockwise_total.defvjp(_blockwise_forward, _blockwise_backward)


def _varying_like(x: Array, like: Array) -> Array:
    """Marks `x` as differing between the shards of a `shard_map` if `like` does; the transpose sums over them."""
    # One by one, as `pcast` wants axes of one state: a gathered weight is reduced over some, and the same along others.
    for axis in sorted(jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying):
        x = jax.lax.pcast(x, axis, to="varying")
    return x


def _flatten(
    hidden: Float[Array, "B S D"], labels: Int[Array, "B S"], weight: Float[Array, "B S"], vocab_size: int
) -> tuple[Float[Array, "blocks block D"], Int[Array, "blocks block"], Float[Array, "blocks block"]]:
    """Cuts the tokens into blocks; the last is filled up with tokens of weight 0."""
    tokens = labels.size
    block = choose_block(tokens, vocab_size, current_backend())
    blocks = -(-tokens // block)
    padding = blocks * block - tokens

    def cut(x: Array) -> Array:
        flat = x.reshape(tokens, *x.shape[2:])
        padded = jnp.pad(flat, ((0, padding), *((0, 0) for _ in x.shape[2:]))) if padding else flat
        return padded.reshape(blocks, block, *x.shape[2:])

    return cut(hidden), cut(labels), cut(weight)


def _per_shard(
    function: Callable[..., Array], hidden: Float[Array, "B S D"], head: Float[Array, "D V"], *per_token: Array
) -> Array:
    """Runs `function(hidden, head, *per_token)` on each device's tokens with the whole head; joins the results.

    Devices along `model` share out the positions, as they have the same sequences, unless these do not divide.
    """
    if not explicit_mesh():
        return function(hidden, head, *per_token)
    positions = "model" if hidden.shape[1] % get_abstract_mesh().shape["model"] == 0 else None
    whole = gather(head, None, None)

    def local(hidden: Float[Array, "B S D"], head: Float[Array, "D V"], *per_token: Array) -> Array:
        return function(hidden, _varying_like(head, hidden), *per_token)

    mine = PartitionSpec(BATCH_AXES, positions)
    in_specs = (mine, jax.typeof(whole).sharding.spec, *(mine for _ in per_token))
    placed = (constrain(x, BATCH_AXES, positions, *(None for _ in x.shape[2:])) for x in (hidden, *per_token))
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=mine)
    return mapped(next(placed), whole, *placed)
