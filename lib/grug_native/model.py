"""The Llama-style transformer: RMSNorm, rotary embeddings (half-split), grouped-query attention, SwiGLU, any head.

Weights are plain arrays with their shapes in their types. The blocks are one `Block` whose leaves are stacked over
the layers, whether the layers are then scanned or unrolled, so both run the same checkpoint.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, get_args, override

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grug_native.attention import ATTENTION_NAMES, AttentionName, attention, prepare_mask
from grug_native.hf_llama import llama_form, llama_sizes
from grug_native.kv_cache import KeyValueCache, LayerCache, Reading
from grug_native.language_model import (
    Aux,
    FlopsPerToken,
    HfForm,
    LanguageModel,
    root_mean_square,
    shard_parameters,
    transformer_flops,
    weight,
)
from grug_native.layers import (
    MLP,
    RematName,
    RMSNorm,
    ScanName,
    embed_tokens,
    flatten_tokens,
    merge_heads,
    normal,
    project_back,
    resolve_remat,
    resolve_scan,
    split_heads,
    through_layers,
    to_logits,
)
from grug_native.rotary import GrugRopeConfig, apply_rotary, rotary_tables
from grug_native.sharding import batch_shards, check_divides, state_shards, unshard
from grug_native.types import AttentionMask


@dataclass(frozen=True, kw_only=True)
class GrugModelConfig:
    """Shape and kernels of a `Transformer`. Sizes are counts; nothing here needs a device."""

    vocab_size: int
    """Rows of the embedding: every token id is below it."""
    hidden_dim: int
    """Features of the residual stream (D)."""
    intermediate_dim: int
    """Features inside the MLP (F)."""
    num_layers: int
    """Blocks (L)."""
    num_heads: int
    """Query heads (H)."""
    num_kv_heads: int
    """Key/value heads (N); divides `num_heads`. Equal to it for multi-head attention."""
    max_seq_len: int
    """Longest sequence, in tokens."""
    head_dim: int | None = None
    """Features of a head (E), even. None means `hidden_dim // num_heads`."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""
    layer_norm_eps: float = 1e-5
    """Added to the mean square inside each RMSNorm."""
    initializer_std: float = 0.02
    """Standard deviation of the truncated normal that fills every matrix."""
    rope: GrugRopeConfig = GrugRopeConfig()
    """Rotary embeddings."""
    attention: AttentionName = "auto"
    """Attention kernel, by name."""
    remat: RematName = "auto"
    """What the backward pass recomputes; see `resolve_remat`."""
    scan_layers: ScanName = "auto"
    """One compiled block in a loop (compiles fast, for deep models), or the blocks unrolled (runs faster); `auto` scans
    where there are many of them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, int | None) and value is not None and value <= 0:
                raise ValueError(f"model.{field.name}={value} must be positive")
        if self.head_dim is None and self.hidden_dim % self.num_heads != 0:
            raise ValueError(
                f"model.hidden_dim={self.hidden_dim} is not divisible by model.num_heads={self.num_heads}: "
                "choose a divisor, or set model.head_dim"
            )
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}: "
                "each key/value head serves a whole number of query heads"
            )
        if self.features_per_head % 2 != 0:
            raise ValueError(f"model.head_dim={self.features_per_head} must be even: rotary embeddings turn pairs")
        for name, value, known in (
            ("attention", self.attention, ATTENTION_NAMES),
            ("remat", self.remat, get_args(RematName)),
        ):
            if value not in known:
                raise ValueError(f"model.{name}={value!r} is unknown: choose one of {', '.join(known)}")
        if self.scan_layers not in (True, False, "auto"):
            raise ValueError(f"model.scan_layers={self.scan_layers!r} is unknown: choose one of true, false, auto")

    @property
    def features_per_head(self) -> int:
        """Features of a head (E), resolved."""
        return self.hidden_dim // self.num_heads if self.head_dim is None else self.head_dim

    def init(self, *, key: PRNGKeyArray) -> "Transformer":
        """Draws all weights, in f32, laid out over the ambient mesh if there is one.

        Raises:
            ValueError: if the heads do not divide over the mesh.
        """
        return Transformer.init(self, key=key)

    def to_hf(self) -> HfForm:
        """A `LlamaForCausalLM`."""
        return llama_form(asdict(self) | {"head_dim": self.features_per_head})

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "GrugModelConfig":
        """The shape that a Llama's `config.json` promises; a `ValueError` names what this model does not have."""
        return GrugModelConfig(**llama_sizes(raw))


class Context(NamedTuple):
    """What all layers share."""

    rope: tuple[Float[Array, "S half"], Float[Array, "S half"]]
    """`rotary_tables` of the positions."""
    mask: AttentionMask
    """Who may attend to whom."""
    reading: Reading | None
    """Where the tokens stand that are read after others; None if there are no others."""


class Attention(eqx.Module):
    """Grouped-query self-attention with rotary embeddings."""

    wq: Float[Array, "D Q"] = eqx.field(metadata=weight("matrix", "data", "model"))
    wk: Float[Array, "D P"] = eqx.field(metadata=weight("matrix", "data", "model"))
    wv: Float[Array, "D P"] = eqx.field(metadata=weight("matrix", "data", "model"))
    wo: Float[Array, "Q D"] = eqx.field(metadata=weight("matrix", "model", "data"))

    def __call__(
        self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None, config: GrugModelConfig
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """Mixes positions as the mask allows."""
        tokens = flatten_tokens(x)
        projected = (tokens @ unshard(w, None, "model") for w in (self.wq, self.wk, self.wv))
        q, k, v = (split_heads(y, x, config.features_per_head) for y in projected)
        q, k = apply_rotary(q, *context.rope), apply_rotary(k, *context.rope)
        if context.reading is None or cache is None:
            mixed = attention(q, k, v, context.mask, implementation=config.attention)
        else:
            mixed, cache = context.reading.attend(q, k, v, context.mask, cache)
        return project_back(merge_heads(mixed), self.wo, x), cache


class Block(eqx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    attn_norm: RMSNorm
    attn: Attention
    mlp_norm: RMSNorm
    mlp: MLP

    @staticmethod
    def init(config: GrugModelConfig, *, key: PRNGKeyArray) -> "Block":
        """Draws the weights of one layer."""
        q, k, v, o, gate, up, down = jax.random.split(key, 7)
        d, f, std = config.hidden_dim, config.intermediate_dim, config.initializer_std
        heads, kv_heads = (n * config.features_per_head for n in (config.num_heads, config.num_kv_heads))
        return Block(
            attn_norm=RMSNorm(jnp.ones(d)),
            attn=Attention(
                wq=normal(q, (d, heads), std),
                wk=normal(k, (d, kv_heads), std),
                wv=normal(v, (d, kv_heads), std),
                wo=normal(o, (heads, d), std),
            ),
            mlp_norm=RMSNorm(jnp.ones(d)),
            mlp=MLP(gate=normal(gate, (d, f), std), up=normal(up, (d, f), std), down=normal(down, (f, d), std)),
        )

    def __call__(
        self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None, config: GrugModelConfig
    ) -> tuple[Float[Array, "B S D"], tuple[LayerCache | None, dict[str, Array]]]:
        """The residual stream after the layer; the layer's cache, and how large its parts' outputs are."""
        attended, cache = self.attn(self.attn_norm(x, eps=config.layer_norm_eps), context, cache, config)
        x = x + attended
        transformed = self.mlp(self.mlp_norm(x, eps=config.layer_norm_eps))
        x = x + transformed
        outputs = {"blocks.attn": attended, "blocks.mlp": transformed, "blocks": x}
        return x, (cache, {name: root_mean_square(output) for name, output in outputs.items()})


class Transformer(LanguageModel):
    """The Llama-style model; see `LanguageModel` for its methods."""

    embed: Float[Array, "V D"] = eqx.field(metadata=weight("embedding", "model", "data"))
    blocks: Block
    """All layers in one `Block`: each leaf has a leading layer axis `L`."""
    final_norm: RMSNorm
    lm_head: Float[Array, "D V"] | None = eqx.field(metadata=weight("head", "data", "model"))
    """None where the head is the embedding."""
    config: GrugModelConfig = eqx.field(static=True)

    @staticmethod
    def init(config: GrugModelConfig, *, key: PRNGKeyArray) -> "Transformer":
        """Draws all weights; see `GrugModelConfig.init`."""
        for name, axis in (
            ("hidden_dim", "data"),
            ("vocab_size", "model"),
            ("intermediate_dim", "model"),
            ("num_kv_heads", "model"),
        ):
            check_divides(f"model.{name}", getattr(config, name), axis)
        embed, head, blocks = jax.random.split(key, 3)
        model = Transformer(
            embed=normal(embed, (config.vocab_size, config.hidden_dim), config.initializer_std),
            blocks=eqx.filter_vmap(lambda k: Block.init(config, key=k))(jax.random.split(blocks, config.num_layers)),
            final_norm=RMSNorm(jnp.ones(config.hidden_dim)),
            lm_head=None
            if config.tie_embeddings
            else normal(head, (config.hidden_dim, config.vocab_size), config.initializer_std),
            config=config,
        )
        return shard_parameters(model)

    @override
    def hidden(
        self, tokens: Int[Array, "B S"], mask: AttentionMask, *, cache: KeyValueCache | None = None
    ) -> tuple[Float[Array, "B S D"], Aux, KeyValueCache | None]:
        config, seq_len = self.config, tokens.shape[1]
        if seq_len > config.max_seq_len:
            raise ValueError(f"a sequence of {seq_len} tokens is longer than model.max_seq_len={config.max_seq_len}")
        x = embed_tokens(self.embed, tokens)
        reading = None if cache is None else cache.read(tokens, mask)
        if reading is None:
            mask = prepare_mask(
                mask,
                seq_len=seq_len,
                head_dim=config.features_per_head,
                dtype=x.dtype.name,
                implementation=config.attention,
            )
        positions = jnp.arange(seq_len) if reading is None else reading.positions
        context = Context(rotary_tables(config.rope, config.features_per_head, positions), mask, reading)

        def apply(
            x: Float[Array, "B S D"], layer: tuple[Block, LayerCache | None]
        ) -> tuple[Float[Array, "B S D"], tuple[LayerCache | None, dict[str, Array]]]:
            block, own = layer
            return block(x, context, own, config)

        sizes = {"embed": root_mean_square(x)}
        x, (layers, of_layers) = through_layers(
            apply,
            x,
            (self.blocks, None if cache is None else cache.layers),
            scan=resolve_scan(config.scan_layers, config.num_layers),
            remat=resolve_remat(
                config.remat,
                tokens=tokens.size // batch_shards(),
                shards=state_shards(),
                parameters=sum(leaf.size for leaf in jax.tree.leaves(self)),
                activations=activation_bytes(config),
            ),
        )
        x = self.final_norm(x, eps=config.layer_norm_eps)
        aux = Aux(activations=sizes | of_layers | {"final_norm": root_mean_square(x)})
        longer = None if cache is None or reading is None or layers is None else cache.after(reading, layers)
        return x, aux, longer

    @override
    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return to_logits(hidden, self.head)

    @property
    def head(self) -> Float[Array, "D V"]:
        """What `unembed` multiplies with."""
        return self.embed.T if self.lm_head is None else self.lm_head

    @override
    def init_cache(self, batch: int, length: int, dtype: str) -> KeyValueCache:
        config = self.config
        return KeyValueCache.empty(
            config.num_layers, batch, length, config.num_kv_heads, config.features_per_head, dtype
        )

    @override
    def flops_per_token(self, seq_len: int) -> FlopsPerToken:
        config = self.config
        # The head is as large as the embedding, tied to it or not.
        matrices = sum(leaf.size for leaf in jax.tree.leaves((self.blocks.attn, self.blocks.mlp, self.embed)))
        features = config.num_layers * config.num_heads * config.features_per_head
        return transformer_flops(matrices=matrices, attention_features=features, seq_len=seq_len)


def activation_bytes(config: GrugModelConfig) -> Mapping[RematName, int]:
    """What the forward pass keeps of a token in all layers, in bf16; attention keeps no scores."""
    heads, kv_heads = (n * config.features_per_head for n in (config.num_heads, config.num_kv_heads))
    products = 2 * heads + 2 * kv_heads + 2 * config.hidden_dim + 2 * config.intermediate_dim
    kept: dict[RematName, int] = {
        "none": products + heads + 2 * kv_heads + 6 * config.hidden_dim + 3 * config.intermediate_dim,
        "dots": products + config.hidden_dim,
        "full": config.hidden_dim,
    }
    return {name: 2 * config.num_layers * numbers for name, numbers in kept.items()}


MODEL_PRESETS: dict[str, GrugModelConfig] = {
    name: GrugModelConfig(
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
        intermediate_dim=intermediate_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        max_seq_len=max_seq_len,
    )
    for name, (vocab_size, hidden_dim, intermediate_dim, num_layers, num_heads, max_seq_len) in {
        "tiny": (4096, 128, 448, 4, 4, 256),
        "130m": (128_256, 512, 1792, 6, 8, 2048),
        "300m": (128_256, 768, 2688, 12, 12, 2048),
        "520m": (128_256, 1024, 3584, 24, 16, 2048),
        "1_2b": (128_256, 2048, 7168, 16, 16, 2048),
    }.items()
}
"""The speedrun's sizes (Llama 3 vocabulary), and `tiny`, which a laptop's CPU trains in minutes."""
