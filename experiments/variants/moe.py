"""A mixture of experts: the Llama-style transformer, its MLP replaced by routed experts and one that serves all tokens.

No token is dropped. Tokens are sorted by expert, so that each matrix of experts is one grouped product. On a mesh each
device along `expert` has some of the experts, and computes their share for the tokens of all devices along it.

References:
    The losses: Fedus et al. 2021 (Switch, arXiv 2101.03961), Zoph et al. 2022 (ST-MoE, arXiv 2202.08906). The shared
    expert: Dai et al. 2024 (DeepSeekMoE, arXiv 2401.06066). Dropless: Gale et al. 2022 (MegaBlocks, arXiv 2211.15841).
"""

from dataclasses import dataclass, fields
from typing import override

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grug_native.attention import AttentionName, prepare_mask
from grug_native.kv_cache import KeyValueCache, LayerCache
from grug_native.language_model import Aux, FlopsPerToken, LanguageModel, shard_parameters, transformer_flops, weight
from grug_native.layers import (
    RematName,
    RMSNorm,
    ScanName,
    embed_tokens,
    flatten_tokens,
    normal,
    resolve_scan,
    through_layers,
    to_logits,
)
from grug_native.model import Block, Context, GrugModelConfig
from grug_native.rotary import GrugRopeConfig, rotary_tables
from grug_native.sharding import BATCH_AXES, check_divides, explicit_mesh, out_sharding, unshard
from grug_native.types import AttentionMask


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Shape and losses of a `Mixture`; what has no text of its own is as in `GrugModelConfig`."""

    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_seq_len: int
    expert_dim: int
    """Features inside a routed expert (F)."""
    shared_dim: int
    """Features inside the expert that serves all tokens."""
    num_experts: int = 8
    """Routed experts (E)."""
    experts_per_token: int = 2
    """Those that a token is sent to (k)."""
    balance_weight: float = 0.01
    """Weight of the loss that wants all experts to be used alike; it is at least 1 for each layer."""
    router_z_weight: float = 0.0
    """Weight of the squared log-partition of the router."""
    initializer_std: float = 0.02
    rope: GrugRopeConfig = GrugRopeConfig()
    attention: AttentionName = "auto"
    remat: RematName = "none"
    scan_layers: ScanName = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"model.experts_per_token={self.experts_per_token} must lie in [1, {self.num_experts}]")
        _ = self.dense  # It checks what both have.

    @property
    def dense(self) -> GrugModelConfig:
        """The same model with the shared expert only."""
        shared = {item.name for item in fields(GrugModelConfig)} & {item.name for item in fields(self)}
        return GrugModelConfig(intermediate_dim=self.shared_dim, **{name: getattr(self, name) for name in shared})

    def init(self, *, key: PRNGKeyArray) -> "Mixture":
        """Draws the weights."""
        for name, axis in (("num_experts", "expert"), ("expert_dim", "model"), ("num_kv_heads", "model")):
            check_divides(f"model.{name}", getattr(self, name), axis)
        embed, layers, head = jax.random.split(key, 3)
        table, std = (self.vocab_size, self.hidden_dim), self.initializer_std
        e, d, f = self.num_experts, self.hidden_dim, self.expert_dim

        def draw(key: PRNGKeyArray) -> Layer:
            block, *keys = jax.random.split(key, 5)
            shapes = (d, e), (e, d, f), (e, d, f), (e, f, d)
            experts = Experts(*(normal(k, shape, std) for k, shape in zip(keys, shapes, strict=True)))
            return Layer(Block.init(self.dense, key=block), experts)

        layers = eqx.filter_vmap(draw)(jax.random.split(layers, self.num_layers))
        table, lm_head = normal(embed, table, std), normal(head, table[::-1], std)
        norm = RMSNorm(jnp.ones(d))
        return shard_parameters(Mixture(embed=table, layers=layers, final_norm=norm, lm_head=lm_head, config=self))


type Routing = dict[str, Array]
"""What a router says, with a leading axis of layers where they are stacked: `balance` is 1 where all experts are alike,
`z` the mean square of the log-partition, `entropy` in nats a token, `share` each expert's of all choices."""


class Experts(eqx.Module):
    """SwiGLU networks, of which a router chooses some for each token."""

    router: Float[Array, "D E"] = eqx.field(metadata=weight("matrix", "data", None))
    gate: Float[Array, "E D F"] = eqx.field(metadata=weight("matrix", "expert", "data", "model"))
    up: Float[Array, "E D F"] = eqx.field(metadata=weight("matrix", "expert", "data", "model"))
    down: Float[Array, "E F D"] = eqx.field(metadata=weight("matrix", "expert", "model", "data"))

    def __call__(self, x: Float[Array, "B S D"], chosen: int) -> tuple[Float[Array, "B S D"], Routing]:
        """Sends each token to so many experts, and adds up their outputs by the probabilities of the choice."""
        tokens, number = flatten_tokens(x), self.router.shape[-1]
        scores = tokens.astype(jnp.float32) @ unshard(self.router, None, None).astype(jnp.float32)
        log_probabilities = jax.nn.log_softmax(scores)
        probabilities = jnp.exp(log_probabilities)
        share_of_token, ids = jax.lax.top_k(probabilities, chosen)
        share = jnp.mean((ids[:, :, None] == jnp.arange(number)).astype(jnp.float32), axis=(0, 1))
        routing = {
            "balance": number * jnp.sum(share * jnp.mean(probabilities, axis=0)),
            "z": jnp.mean(jnp.square(jax.nn.logsumexp(scores, axis=-1))),
            "entropy": -jnp.mean(jnp.sum(probabilities * log_probabilities, axis=-1)),
            "share": share,
        }
        given = tokens, ids, share_of_token.astype(x.dtype)
        gate, up = (unshard(w, "expert", None, "model") for w in (self.gate, self.up))
        weights = gate, up, unshard(self.down, "expert", "model", None)
        if explicit_mesh():
            rows = PartitionSpec(BATCH_AXES, None)
            specs = tuple(jax.typeof(leaf).sharding.spec for leaf in weights)
            mixed = jax.shard_map(_exchange, in_specs=((rows, rows, rows), specs), out_specs=rows)(given, weights)
        else:
            mixed = _apply_experts(given, weights, 0)
        return jnp.reshape(mixed, x.shape, out_sharding=out_sharding(BATCH_AXES, None, None)), routing


type Given = tuple[Float[Array, "T D"], Int[Array, "T k"], Float[Array, "T k"]]
"""Tokens, the experts that each is sent to, and their shares in its output."""
type Weights = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


def _exchange(given: Given, weights: Weights) -> Float[Array, "T D"]:
    """`_apply_experts` on a device: what it has of the experts, for the tokens of all devices along `expert`."""
    all_given = jax.tree.map(lambda x: jax.lax.all_gather(x, "expert", tiled=True), given)
    first = jax.lax.axis_index("expert") * weights[0].shape[0]
    parts = _apply_experts(all_given, jax.tree.map(_per_batch_shard, weights), first)
    return jax.lax.psum_scatter(jax.lax.psum(parts, "model"), "expert", scatter_dimension=0, tiled=True)


def _per_batch_shard(leaf: Array) -> Array:
    """Marks a weight as used with other tokens on each device of the batch, so that its gradients are added up."""
    for axis in sorted(set(BATCH_AXES) - jax.typeof(leaf).manual_axis_type.varying):
        leaf = jax.lax.pcast(leaf, axis, to="varying")
    return leaf


def _apply_experts(given: Given, weights: Weights, first: Int[Array, ""] | int) -> Float[Array, "T D"]:
    """The outputs of experts `first`, `first + 1`, ..., each token's own added up; those of others count as zero."""
    tokens, ids, shares = given
    gate, up, down = weights
    number, chosen = gate.shape[0], ids.shape[1]
    local = jnp.ravel(ids) - first
    local = jnp.where((local >= 0) & (local < number), local, number)
    order = jnp.argsort(local)
    sizes = jnp.sum(local[:, None] == jnp.arange(number), axis=0, dtype=jnp.int32)
    # What grouped products leave in rows that belong to no group is not said: none of it may get out, nor back.
    ours = (local[order] < number)[:, None]
    rows = jnp.where(ours, tokens[order // chosen], 0)
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    outputs = jnp.where(ours, jax.lax.ragged_dot(jnp.where(ours, inner, 0), down, sizes), 0)
    of_token = outputs[jnp.argsort(order)].reshape(*ids.shape, -1)
    return jnp.sum(of_token * shares[:, :, None], axis=1)


class Layer(eqx.Module):
    """A block of the transformer, whose MLP is the shared expert, and the routed ones beside it."""

    block: Block
    experts: Experts

    def __call__(
        self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None, config: MixtureConfig
    ) -> tuple[Float[Array, "B S D"], tuple[LayerCache | None, Routing]]:
        """The residual stream after the layer; its cache, and what its router says."""
        block, dense = self.block, config.dense
        attended, cache = block.attn(block.attn_norm(x, eps=dense.layer_norm_eps), context, cache, dense)
        x = x + attended
        normed = block.mlp_norm(x, eps=dense.layer_norm_eps)
        routed, routing = self.experts(normed, config.experts_per_token)
        return x + block.mlp(normed) + routed, (cache, routing)


class Mixture(LanguageModel):
    """The model; see `LanguageModel` for its methods."""

    embed: Float[Array, "V D"] = eqx.field(metadata=weight("embedding", "model", "data"))
    layers: Layer
    """All layers in one: each leaf has a leading axis of layers."""
    final_norm: RMSNorm
    lm_head: Float[Array, "D V"] = eqx.field(metadata=weight("head", "data", "model"))
    config: MixtureConfig = eqx.field(static=True)

    @override
    def hidden(
        self, tokens: Int[Array, "B S"], mask: AttentionMask, *, cache: KeyValueCache | None = None
    ) -> tuple[Float[Array, "B S D"], Aux, KeyValueCache | None]:
        config, features, seq_len = self.config, self.config.dense.features_per_head, tokens.shape[1]
        x = embed_tokens(self.embed, tokens)
        reading = None if cache is None else cache.read(tokens, mask)
        if reading is None:
            mask = prepare_mask(
                mask, seq_len=seq_len, head_dim=features, dtype=x.dtype.name, implementation=config.attention
            )
        positions = jnp.arange(seq_len) if reading is None else reading.positions
        context = Context(rotary_tables(config.rope, features, positions), mask, reading)
        stacked = self.layers, None if cache is None else cache.layers
        scan = resolve_scan(config.scan_layers, config.num_layers)
        x, (caches, routing) = through_layers(
            lambda x, layer: layer[0](x, context, layer[1], config), x, stacked, scan=scan, remat=config.remat
        )
        losses = {
            "router/balance_loss": config.balance_weight * jnp.sum(routing["balance"]),
            "router/z_loss": config.router_z_weight * jnp.sum(routing["z"]),
        }
        metrics = {
            "router/entropy": jnp.mean(routing["entropy"]),
            "router/max_load": config.num_experts * jnp.max(routing["share"]),
            "router/share": jnp.mean(routing["share"], axis=0),
        }
        longer = None if cache is None or reading is None or caches is None else cache.after(reading, caches)
        return self.final_norm(x, eps=config.dense.layer_norm_eps), Aux(losses, metrics), longer

    @override
    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return to_logits(hidden, self.lm_head)

    @override
    def init_cache(self, batch: int, length: int, dtype: str) -> KeyValueCache:
        config, features = self.config, self.config.dense.features_per_head
        return KeyValueCache.empty(config.num_layers, batch, length, config.num_kv_heads, features, dtype)

    @override
    def flops_per_token(self, seq_len: int) -> FlopsPerToken:
        config, layers, routed = self.config, self.layers, self.layers.experts
        dense = layers.block.attn, layers.block.mlp, routed.router, self.lm_head
        active = 3 * routed.gate.size * config.experts_per_token // config.num_experts
        features = config.num_layers * config.num_heads * config.dense.features_per_head
        whole = active + sum(leaf.size for leaf in jax.tree.leaves(dense))
        return transformer_flops(matrices=whole, attention_features=features, seq_len=seq_len)
