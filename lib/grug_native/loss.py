"""Next-token cross-entropy over a `GrugLmExample`, without a scatter in its gradient.

Two implementations of one function, by name: `full` holds the logits of all tokens at once; `blockwise` holds those of
`BLOCK_TOKENS` tokens and computes the gradients in the forward pass, so that the logits are computed once. Both make
logits by the model's `unembed`, whatever that is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Bool, Float, Int

from grug_native.kernels.backend import Backend, current_backend
from grug_native.kernels.choices import note_choice
from grug_native.language_model import Aux, LanguageModel, cast_parameters
from grug_native.sharding import BATCH_AXES, batch_shards, explicit_mesh, reshard, unshard
from grug_native.types import AttentionMask, LmBatch, Scalar, check_lm_batch

CrossEntropyName = Literal["auto", "full", "blockwise"]
"""A cross-entropy implementation; `auto` lets `resolve_cross_entropy` decide."""

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


def resolve_cross_entropy(
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


def resolve_block(tokens: int, vocab_size: int, backend: Backend) -> int:
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


def per_token_loss(
    params: LanguageModel,
    batch: LmBatch,
    *,
    compute_dtype: ComputeDtype = "float32",
    cross_entropy: CrossEntropyName = "auto",
) -> Float[Array, "B S"]:
    """Nats of predicting `tokens[b, s + 1]` at position `s`, unweighted, in f32.

    The last position of each row predicts token 0: it means nothing, and `loss_weight` is 0 there.
    """
    check_lm_batch(batch)
    score = partial(score_tokens, compute_dtype=compute_dtype, cross_entropy=cross_entropy)
    return score(params, batch.tokens, next_tokens(batch.tokens), batch.attn_mask).nats


class TokenScores(NamedTuple):
    """What a model thinks of a token at each position."""

    nats: Float[Array, "B S"]
    """Negative logarithms of their probabilities."""
    log_z: Float[Array, "B S"]
    """Logarithms of the sums over the vocabulary."""
    is_greedy: Bool[Array, "B S"]
    """Whether no token is likelier."""


def score_tokens(
    params: LanguageModel,
    tokens: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    mask: AttentionMask,
    *,
    compute_dtype: ComputeDtype = "float32",
    cross_entropy: CrossEntropyName = "auto",
) -> TokenScores:
    """Scores a target at each position, in f32; its logits are held as those of the training loss are."""
    model = cast_parameters(params, compute_dtype)
    hidden, _, _ = model.hidden(tokens, mask)
    if _implementation(model, tokens, cross_entropy) == "full":
        return _score(model.unembed(hidden), targets)
    head, weights = _find_head(model, hidden)

    def local(
        weights: list[Array], hidden: Float[Array, "B S D"], targets: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S"], Float[Array, "B S"], Bool[Array, "B S"]]:
        blocks = _cut((hidden, targets), params.config.vocab_size)
        scores = jax.lax.map(lambda block: tuple(_score(head.unembed(weights, block[0]), block[1])), blocks)
        return jax.tree.map(lambda x: x.reshape(-1)[: targets.size].reshape(targets.shape), scores)

    return TokenScores(*_per_shard(local, weights, hidden, targets))


class Part(NamedTuple):
    """What a microbatch is a part of: a whole batch."""

    weight: Scalar
    """Sum of `loss_weight` over it."""
    microbatches: int
    """Of the whole batch."""


def next_token_loss(
    params: LanguageModel,
    batch: LmBatch,
    part: Part | None = None,
    *,
    z_loss_weight: float = 0.0,
    compute_dtype: ComputeDtype = "float32",
    cross_entropy: CrossEntropyName = "auto",
) -> tuple[Scalar, Aux]:
    """Mean over the batch, weighted by `loss_weight`, of `-log p(next token) + z_loss_weight * logsumexp(logits)^2`.

    Zero where every weight is zero. The model's own losses are added to it, and are in what is returned beside it.

    Of a microbatch, given of what it is a `part`, it is the share of the whole batch's loss.

    References:
        The z-loss is that of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """
    check_lm_batch(batch)
    model = cast_parameters(params, compute_dtype)
    hidden, aux, _ = model.hidden(batch.tokens, batch.attn_mask)
    targets, weight = next_tokens(batch.tokens), batch.loss_weight
    if _implementation(model, batch.tokens, cross_entropy) == "full":
        scores = _score(model.unembed(hidden), targets)
        total = jnp.sum(weight * (scores.nats + z_loss_weight * jnp.square(scores.log_z)))
    else:
        head, weights = _find_head(model, hidden)

        def local(
            weights: list[Array], hidden: Float[Array, "B S D"], targets: Int[Array, "B S"], weight: Float[Array, "B S"]
        ) -> Float[Array, "1 1"]:
            blocks = _cut((hidden, targets, weight), params.config.vocab_size)
            total: Array = _blockwise_total(head, z_loss_weight, weights, *blocks)
            return total[None, None]

        total = jnp.sum(_per_shard(local, weights, hidden, targets, weight))
    whole, parts = part or Part(jnp.sum(weight), 1)
    loss = jnp.where(whole > 0, total / jnp.where(whole > 0, whole, 1.0), 0.0)
    return loss + sum(aux.losses.values()) / parts, aux


def next_tokens(tokens: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """At each position the token after it, which it predicts; at the last one 0, which means nothing."""
    # Not `jnp.roll`: it loses the sharding of a batch of one sequence.
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))


def _implementation(model: LanguageModel, tokens: Int[Array, "B S"], asked: CrossEntropyName) -> CrossEntropyName:
    vocab_size, backend, local = model.config.vocab_size, current_backend(), tokens.size // batch_shards()
    name, reason = resolve_cross_entropy(asked, backend=backend.name, tokens=local, vocab_size=vocab_size)
    if name == "blockwise":
        # Devices along `model` share out the positions.
        mesh = get_abstract_mesh()
        block = resolve_block(local if mesh.empty else local // mesh.shape["model"], vocab_size, backend)
        reason = f"{reason}; {block:,} tokens at a time"
    note_choice("cross-entropy", name, reason)
    return name


def _score(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> TokenScores:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Comparing with every column instead of indexing keeps a scatter out of the gradient: XLA:CPU runs it serially.
    target = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    return TokenScores(log_z - target, log_z, target >= jnp.max(logits, axis=-1))


def _is_target(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Bool[Array, "*batch V"]:
    columns = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    return targets[..., None] == columns.reshape(*(1 for _ in targets.shape), -1)


@dataclass(frozen=True)
class _Head:
    """A model's `unembed` as a function of the weights that it reads."""

    treedef: jax.tree_util.PyTreeDef
    places: tuple[int, ...]

    def unembed(self, weights: list[Array], hidden: Float[Array, "block D"]) -> Float[Array, "block V"]:
        leaves: list[Array | None] = [None] * self.treedef.num_leaves
        for place, weight in zip(self.places, weights, strict=True):
            leaves[place] = weight
        return cast(LanguageModel, jax.tree.unflatten(self.treedef, leaves)).unembed(hidden)


def _find_head(model: LanguageModel, hidden: Float[Array, "B S D"]) -> tuple[_Head, list[Array]]:
    """The model's `unembed`, and the weights that it reads: found by tracing it for a position of each sequence."""
    leaves, treedef = jax.tree.flatten(model)
    traced = jax.make_jaxpr(lambda leaves, x: jax.tree.unflatten(treedef, leaves).unembed(x))(leaves, hidden[:, 0])
    read = {id(variable) for equation in traced.eqns for variable in equation.invars}
    places = tuple(n for n, variable in enumerate(traced.jaxpr.invars[: len(leaves)]) if id(variable) in read)
    return _Head(treedef, places), [leaves[n] for n in places]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise_total(
    head: _Head,
    z_loss_weight: float,
    weights: list[Array],
    hidden: Float[Array, "blocks block D"],
    targets: Int[Array, "blocks block"],
    weight: Float[Array, "blocks block"],
) -> Scalar:
    def total_of(block: tuple[Array, Array, Array]) -> Scalar:
        scores = _score(head.unembed(weights, block[0]), block[1])
        return jnp.sum(block[2] * (scores.nats + z_loss_weight * jnp.square(scores.log_z)))

    return jnp.sum(jax.lax.map(total_of, (hidden, targets, weight)))


def _blockwise_forward(
    head: _Head,
    z_loss_weight: float,
    weights: list[Array],
    hidden: Float[Array, "blocks block D"],
    targets: Int[Array, "blocks block"],
    weight: Float[Array, "blocks block"],
) -> tuple[Scalar, tuple[list[Array], Array, Array]]:
    """The total and its gradients for a unit cotangent: three matrix products a block where autodiff takes four."""

    def body(
        carry: tuple[Scalar, list[Array]], block: tuple[Array, Array, Array]
    ) -> tuple[tuple[Scalar, list[Array]], tuple[Array, Array]]:
        total, d_weights = carry
        x, y, w = block
        logits, pull = jax.vjp(head.unembed, weights, x)
        scores = _score(logits, y)
        terms = scores.nats + z_loss_weight * jnp.square(scores.log_z)
        probabilities = jnp.exp(logits - scores.log_z[:, None])
        d_logits = (1 + 2 * z_loss_weight * scores.log_z)[:, None] * probabilities - _is_target(logits, y)
        d_block, d_x = pull(w[:, None] * d_logits)
        d_weights = jax.tree.map(lambda total, part: total + part, d_weights, d_block)
        return (total + jnp.sum(w * terms), d_weights), (d_x, terms)

    start = (jnp.zeros((), jnp.float32), [jnp.zeros(leaf.shape, jnp.float32) for leaf in weights])
    start = jax.tree.map(lambda x: _varying_like(x, hidden), start)
    blocks = hidden.shape[0]
    unrolled = current_backend().name == "gpu" and blocks <= _MOST_UNROLLED_BLOCKS
    (total, d_weights), (d_hidden, d_weight) = jax.lax.scan(
        body, start, (hidden, targets, weight), unroll=blocks if unrolled else 1
    )
    d_weights = [total.astype(leaf.dtype) for total, leaf in zip(d_weights, weights, strict=True)]
    return total, (d_weights, d_hidden, d_weight)


def _blockwise_backward(
    head: _Head, z_loss_weight: float, residuals: tuple[list[Array], Array, Array], cotangent: Scalar
) -> tuple[list[Array], Array, None, Array]:
    d_weights, d_hidden, d_weight = jax.tree.map(lambda r: cotangent.astype(r.dtype) * r, residuals)
    return d_weights, d_hidden, None, d_weight


_blockwise_total.defvjp(_blockwise_forward, _blockwise_backward)


def _varying_like(x: Array, like: Array) -> Array:
    """Marks `x` as differing between the shards of a `shard_map` if `like` does; the transpose sums over them."""
    # One by one, as `pcast` wants axes of one state: a gathered weight is reduced over some, and the same along others.
    for axis in sorted(jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying):
        x = jax.lax.pcast(x, axis, to="varying")
    return x


def _cut[*Arrays](per_token: tuple[*Arrays], vocab_size: int) -> tuple[*Arrays]:
    """Cuts the tokens of (B, S, ...) into (blocks, block, ...); the last block is filled up with zeros."""

    def cut(x: Array) -> Array:
        tokens = x.shape[0] * x.shape[1]
        block = resolve_block(tokens, vocab_size, current_backend())
        blocks = -(-tokens // block)
        padding = blocks * block - tokens
        flat = x.reshape(tokens, *x.shape[2:])
        padded = jnp.pad(flat, ((0, padding), *((0, 0) for _ in x.shape[2:]))) if padding else flat
        return padded.reshape(blocks, block, *x.shape[2:])

    return cast(tuple[*Arrays], jax.tree.map(cut, per_token))


def _per_shard[Result](function: Callable[..., Result], weights: list[Array], *per_token: Array) -> Result:
    """Runs `function(weights, *per_token)` on each device's tokens with whole weights; joins the results.

    Devices along `model` share out the positions, as they have the same sequences, unless these do not divide.
    """
    if not explicit_mesh():
        return function(weights, *per_token)
    positions = "model" if per_token[0].shape[1] % get_abstract_mesh().shape["model"] == 0 else None
    whole = [unshard(leaf, *(None for _ in leaf.shape)) for leaf in weights]

    def local(weights: list[Array], *per_token: Array) -> Result:
        return function([_varying_like(leaf, per_token[0]) for leaf in weights], *per_token)

    mine = PartitionSpec(BATCH_AXES, positions)
    in_specs = ([jax.typeof(leaf).sharding.spec for leaf in whole], *(mine for _ in per_token))
    placed = (reshard(x, BATCH_AXES, positions, *(None for _ in x.shape[2:])) for x in per_token)
    return jax.shard_map(local, in_specs=in_specs, out_specs=mine)(whole, *placed)
