"""A model of nanochat's and modded-nanogpt's kind.

QK-norm, squared ReLU, soft-capped logits, a window in every other layer, and a head that may be the embedding.

References:
    QK-norm: Henry et al. 2020 (arXiv 2010.04245). Squared ReLU: So et al. 2021 (Primer, arXiv 2109.08668). Soft caps
    and windows in turn: Gemma 2 (arXiv 2408.00118). Together: github.com/KellerJordan/modded-nanogpt.
"""

from dataclasses import dataclass, replace
from typing import override

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grug_native.attention import AttentionName, attention, prepare_mask, with_window
from grug_native.kv_cache import KeyValueCache, LayerCache
from grug_native.language_model import Aux, FlopsPerToken, LanguageModel, shard_parameters, transformer_flops, weight
from grug_native.layers import (
    RematName,
    ScanName,
    embed_tokens,
    flatten_tokens,
    merge_heads,
    normal,
    project_back,
    resolve_scan,
    rms_normalize,
    split_heads,
    through_layers,
    to_logits,
)
from grug_native.model import Context
from grug_native.rotary import GrugRopeConfig, apply_rotary, rotary_tables
from grug_native.sharding import check_divides, unshard
from grug_native.types import AttentionMask


@dataclass(frozen=True, kw_only=True)
class ModdedConfig:
    """Shape and switches of a `Modded`."""

    vocab_size: int
    hidden_dim: int
    num_layers: int
    """Even: they go in pairs, the first of which sees only a window."""
    num_heads: int
    max_seq_len: int
    window: int = 64
    """Positions that the first layer of a pair sees, itself included."""
    soft_cap: float | None = 15.0
    """Logits stay between minus and plus this; None leaves them."""
    qk_norm: bool = True
    """Whether queries and keys are normalised."""
    tied: bool = False
    """Whether the head is the embedding, scaled down."""
    initializer_std: float = 0.02
    rope: GrugRopeConfig = GrugRopeConfig()
    attention: AttentionName = "auto"
    remat: RematName = "none"
    scan_layers: ScanName = "auto"

    def __post_init__(self) -> None:
        if self.num_layers % 2 != 0:
            raise ValueError(f"model.num_layers={self.num_layers} must be even: layers go in pairs")
        if self.hidden_dim % (2 * self.num_heads) != 0:
            raise ValueError(f"model.hidden_dim={self.hidden_dim} must divide over {self.num_heads} heads of even size")

    def init(self, *, key: PRNGKeyArray) -> "Modded":
        """Draws the weights."""
        check_divides("model.num_heads", self.num_heads, "model")
        embed, pairs, head = jax.random.split(key, 3)
        table = (self.vocab_size, self.hidden_dim)
        model = Modded(
            embed=normal(embed, table, self.initializer_std),
            pairs=eqx.filter_vmap(lambda k: Pair.init(self, key=k))(jax.random.split(pairs, self.num_layers // 2)),
            lm_head=None if self.tied else normal(head, table[::-1], self.initializer_std),
            config=self,
        )
        return shard_parameters(model)


class Attention(eqx.Module):
    """Self-attention of which queries and keys may be normalised before they are rotated."""

    wq: Float[Array, "D Q"] = eqx.field(metadata=weight("matrix", "data", "model"))
    wk: Float[Array, "D Q"] = eqx.field(metadata=weight("matrix", "data", "model"))
    wv: Float[Array, "D Q"] = eqx.field(metadata=weight("matrix", "data", "model"))
    wo: Float[Array, "Q D"] = eqx.field(metadata=weight("matrix", "model", "data"))

    def __call__(
        self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None, config: ModdedConfig
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """Mixes positions as the mask allows."""
        tokens, features = flatten_tokens(x), config.hidden_dim // config.num_heads
        projected = (tokens @ unshard(w, None, "model") for w in (self.wq, self.wk, self.wv))
        q, k, v = (split_heads(y, x, features) for y in projected)
        if config.qk_norm:
            q, k = rms_normalize(q, eps=1e-6), rms_normalize(k, eps=1e-6)
        q, k = apply_rotary(q, *context.rope), apply_rotary(k, *context.rope)
        if context.reading is None or cache is None:
            mixed = attention(q, k, v, context.mask, implementation=config.attention)
        else:
            mixed, cache = context.reading.attend(q, k, v, context.mask, cache)
        return project_back(merge_heads(mixed), self.wo, x), cache


class Block(eqx.Module):
    """Attention and an MLP of squared ReLUs, each behind a norm without gains."""

    attn: Attention
    up: Float[Array, "D F"] = eqx.field(metadata=weight("matrix", "data", "model"))
    down: Float[Array, "F D"] = eqx.field(metadata=weight("matrix", "model", "data"))

    @staticmethod
    def init(config: ModdedConfig, *, key: PRNGKeyArray) -> "Block":
        """Draws the weights of one layer; what is added to the residual stream starts at zero."""
        q, k, v, up = jax.random.split(key, 4)
        d, f, std = config.hidden_dim, 4 * config.hidden_dim, config.initializer_std
        square = (d, d)
        attn = Attention(normal(q, square, std), normal(k, square, std), normal(v, square, std), jnp.zeros(square))
        return Block(attn, normal(up, (d, f), std), jnp.zeros((f, d)))

    def __call__(
        self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None, config: ModdedConfig
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """The residual stream after the layer."""
        attended, cache = self.attn(rms_normalize(x, eps=1e-6), context, cache, config)
        x = x + attended
        tokens = flatten_tokens(rms_normalize(x, eps=1e-6))
        squared = jnp.square(jax.nn.relu(tokens @ unshard(self.up, None, "model")))
        return x + project_back(squared, self.down, x), cache


class Pair(eqx.Module):
    """A layer that sees a window, and one that sees everything."""

    local: Block
    whole: Block

    @staticmethod
    def init(config: ModdedConfig, *, key: PRNGKeyArray) -> "Pair":
        """Draws the weights of two layers."""
        one, two = jax.random.split(key)
        return Pair(Block.init(config, key=one), Block.init(config, key=two))


type PairCache = tuple[LayerCache | None, LayerCache | None]


class Modded(LanguageModel):
    """The model; see `LanguageModel` for its methods."""

    embed: Float[Array, "V D"] = eqx.field(metadata=weight("embedding", "model", "data"))
    pairs: Pair
    """All pairs in one: each leaf has a leading axis of pairs."""
    lm_head: Float[Array, "D V"] | None = eqx.field(metadata=weight("head", "data", "model"))
    config: ModdedConfig = eqx.field(static=True)

    @override
    def hidden(
        self, tokens: Int[Array, "B S"], mask: AttentionMask, *, cache: KeyValueCache | None = None
    ) -> tuple[Float[Array, "B S D"], Aux, KeyValueCache | None]:
        config, seq_len = self.config, tokens.shape[1]
        features = config.hidden_dim // config.num_heads
        x = rms_normalize(embed_tokens(self.embed, tokens), eps=1e-6)
        reading = None if cache is None else cache.read(tokens, mask)
        positions = jnp.arange(seq_len) if reading is None else reading.positions
        rope = rotary_tables(config.rope, features, positions)
        narrow = with_window(mask, config.window)
        if reading is None:
            mask, narrow = (
                prepare_mask(m, seq_len=seq_len, head_dim=features, dtype=x.dtype.name, implementation=config.attention)
                for m in (mask, narrow)
            )

        def apply(x: Float[Array, "B S D"], layer: tuple[Pair, PairCache]) -> tuple[Float[Array, "B S D"], PairCache]:
            pair, (one, two) = layer
            x, one = pair.local(x, Context(rope, narrow, reading), one, config)
            x, two = pair.whole(x, Context(rope, mask, reading), two, config)
            return x, (one, two)

        x, layers = through_layers(
            apply,
            x,
            (self.pairs, (None, None) if cache is None else cache.layers),
            scan=resolve_scan(config.scan_layers, config.num_layers),
            remat=config.remat,
        )
        x = rms_normalize(x, eps=1e-6)
        longer = None if cache is None or reading is None else cache.after(reading, layers)
        return x, Aux(metrics={"model/hidden_max": jnp.max(jnp.abs(x.astype(jnp.float32)))}), longer

    @override
    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        cap = self.config.soft_cap
        if self.lm_head is None:
            logits = to_logits(hidden, self.embed.T) / self.config.hidden_dim**0.5
        else:
            logits = to_logits(hidden, self.lm_head)
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @override
    def init_cache(self, batch: int, length: int, dtype: str) -> KeyValueCache:
        config = self.config
        one = KeyValueCache.empty(
            config.num_layers // 2, batch, length, config.num_heads, config.hidden_dim // config.num_heads, dtype
        )
        return replace(one, layers=(one.layers, one.layers))

    @override
    def flops_per_token(self, seq_len: int) -> FlopsPerToken:
        config = self.config
        head = self.embed if self.lm_head is None else self.lm_head
        matrices = head.size + sum(leaf.size for leaf in jax.tree.leaves(self.pairs))
        return transformer_flops(
            matrices=matrices, attention_features=config.num_layers * config.hidden_dim, seq_len=seq_len
        )
