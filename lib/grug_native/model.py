"""The Llama-style transformer: RMSNorm, rotary embeddings (half-split), grouped-query attention, SwiGLU, untied head.

Weights are plain arrays with their shapes in their types. The blocks are one `Block` whose leaves are stacked over
the layers, whether the layers are then scanned or unrolled, so both run the same checkpoint.
"""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grug_native.attention import attention, prepare_mask
from grug_native.backend import current_backend
from grug_native.mesh import BATCH_AXES, constrain, gather, out_sharding
from grug_native.model_config import GrugModelConfig, RematName, choose_remat, choose_scan
from grug_native.rotary import apply_rotary, rotary_tables
from grug_native.types import AttentionMask

ParameterKind = Literal["embedding", "head", "norm", "matrix"]
"""What a parameter is to an optimizer."""


class RMSNorm(eqx.Module):
    """Root-mean-square normalisation, computed in f32.

    References:
        Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    weight: Float[Array, " D"]

    def __call__(self, x: Float[Array, "B S D"], *, eps: float) -> Float[Array, "B S D"]:
        """Normalises each position; `eps` is added to the mean square."""
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
        return (x32 * scale * self.weight.astype(jnp.float32)[None, None, :]).astype(x.dtype)


class Attention(eqx.Module):
    """Grouped-query self-attention with rotary embeddings."""

    wq: Float[Array, "D Q"]
    wk: Float[Array, "D P"]
    wv: Float[Array, "D P"]
    wo: Float[Array, "Q D"]

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rope: tuple[Float[Array, "S half"], Float[Array, "S half"]],
        mask: AttentionMask,
        config: GrugModelConfig,
    ) -> Float[Array, "B S D"]:
        """Mixes positions as `mask` allows; `rope` is `rotary_tables` of the sequence length."""
        tokens = _flatten_tokens(x)
        heads, split = (*x.shape[:2], -1, config.features_per_head), out_sharding(BATCH_AXES, None, "model", None)
        projected = (tokens @ gather(w, None, "model") for w in (self.wq, self.wk, self.wv))
        q, k, v = (jnp.reshape(y, heads, out_sharding=split) for y in projected)
        q, k = apply_rotary(q, *rope), apply_rotary(k, *rope)
        context = attention(q, k, v, mask, implementation=config.attention)
        merged = jnp.reshape(context, (tokens.shape[0], -1), out_sharding=out_sharding(BATCH_AXES, "model"))
        return _project_back(merged, gather(self.wo, "model", None), x)


class MLP(eqx.Module):
    """SwiGLU feed-forward layer.

    References:
        Shazeer 2020 (arXiv 2002.05202).
    """

    gate: Float[Array, "D F"]
    up: Float[Array, "D F"]
    down: Float[Array, "F D"]

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Transforms each position on its own."""
        tokens = _flatten_tokens(x)
        gate, up = gather(self.gate, None, "model"), gather(self.up, None, "model")
        return _project_back(jax.nn.silu(tokens @ gate) * (tokens @ up), gather(self.down, "model", None), x)


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
                wq=_normal(q, (d, heads), std),
                wk=_normal(k, (d, kv_heads), std),
                wv=_normal(v, (d, kv_heads), std),
                wo=_normal(o, (heads, d), std),
            ),
            mlp_norm=RMSNorm(jnp.ones(d)),
            mlp=MLP(gate=_normal(gate, (d, f), std), up=_normal(up, (d, f), std), down=_normal(down, (f, d), std)),
        )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rope: tuple[Float[Array, "S half"], Float[Array, "S half"]],
        mask: AttentionMask,
        config: GrugModelConfig,
    ) -> Float[Array, "B S D"]:
        """The residual stream after the layer."""
        x = x + self.attn(self.attn_norm(x, eps=config.layer_norm_eps), rope, mask, config)
        return x + self.mlp(self.mlp_norm(x, eps=config.layer_norm_eps))


class Transformer(eqx.Module):
    """A causal language model. `model(tokens, mask)` gives hidden states, `model.logits(tokens, mask)` logits."""

    embed: Float[Array, "V D"]
    blocks: Block
    """All layers in one `Block`: each leaf has a leading layer axis `L`."""
    final_norm: RMSNorm
    lm_head: Float[Array, "D V"]
    config: GrugModelConfig = eqx.field(static=True)

    @staticmethod
    def init(config: GrugModelConfig, *, key: PRNGKeyArray) -> "Transformer":
        """Draws all weights, in f32, laid out over the ambient mesh if there is one."""
        embed, head, blocks = jax.random.split(key, 3)
        model = Transformer(
            embed=_normal(embed, (config.vocab_size, config.hidden_dim), config.initializer_std),
            blocks=eqx.filter_vmap(lambda k: Block.init(config, key=k))(jax.random.split(blocks, config.num_layers)),
            final_norm=RMSNorm(jnp.ones(config.hidden_dim)),
            lm_head=_normal(head, (config.hidden_dim, config.vocab_size), config.initializer_std),
            config=config,
        )
        return shard_parameters(model)

    def __call__(self, tokens: Int[Array, "B S"], mask: AttentionMask) -> Float[Array, "B S D"]:
        """Hidden states after the final norm, in the dtype of the weights.

        Args:
            tokens: ids below `config.vocab_size`; larger ones would be clamped by JAX, so they are checked on the host.
            mask: which positions may attend to which.
        """
        config = self.config
        if tokens.shape[1] > config.max_seq_len:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens is longer than model.max_seq_len={config.max_seq_len}"
            )
        # Read in f32, so that the gradient's scatter adds in f32: in bf16 the sum for a common token stalls.
        table = gather(self.embed, None, None).astype(jnp.float32)
        x = table.at[tokens].get(out_sharding=out_sharding(BATCH_AXES, None, None)).astype(self.embed.dtype)
        rope = rotary_tables(config.rope, config.features_per_head, tokens.shape[1])
        mask = prepare_mask(
            mask,
            seq_len=tokens.shape[1],
            head_dim=config.features_per_head,
            dtype=x.dtype.name,
            implementation=config.attention,
        )

        def apply(block: Block, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
            return block(x, rope, mask, config)

        backend, mesh = current_backend(), jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else mesh.shape["replica_dcn"] * mesh.shape["data"]
        state_shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["model"]
        remat, _ = choose_remat(config, backend, tokens=tokens.size // shards, shards=state_shards)
        apply = _rematerialised(apply, remat)
        if choose_scan(config, backend)[0]:
            x, _ = jax.lax.scan(lambda x, block: (apply(block, x), None), x, self.blocks)
        else:
            apply = jax.jit(apply)  # Traced and lowered once for all layers.
            for block in unstack(self.blocks, config.num_layers):
                x = apply(block, x)
        return self.final_norm(x, eps=config.layer_norm_eps)

    def logits(self, tokens: Int[Array, "B S"], mask: AttentionMask) -> Float[Array, "B S V"]:
        """Unnormalised log-probabilities of the next token, in f32."""
        head = gather(self.lm_head, None, "model")
        return jnp.matmul(self(tokens, mask), head, preferred_element_type=jnp.float32)


PARAMETER_KINDS: dict[str, ParameterKind] = {
    "embed": "embedding",
    "lm_head": "head",
    "final_norm": "norm",
    "attn_norm": "norm",
    "mlp_norm": "norm",
    **dict.fromkeys(("wq", "wk", "wv", "wo", "gate", "up", "down"), "matrix"),
}
"""Field name -> kind. A parameter added to the model is added here, or the optimizer refuses it."""

_SPECS: dict[str, tuple[str | None, ...]] = {
    "embed": ("model", "data"),
    "lm_head": ("data", "model"),
    **dict.fromkeys(("wq", "wk", "wv", "gate", "up"), (None, "data", "model")),
    **dict.fromkeys(("wo", "down"), (None, "model", "data")),
}


def parameter_kind(path: tuple[jax.tree_util.KeyEntry, ...]) -> ParameterKind:
    """The kind of the parameter at a pytree path, by its field's exact name.

    Raises:
        ValueError: if no field on the path stands in `PARAMETER_KINDS`.
    """
    for entry in path:
        if isinstance(entry, jax.tree_util.GetAttrKey) and entry.name in PARAMETER_KINDS:
            return PARAMETER_KINDS[entry.name]
    raise ValueError(
        f"parameter {jax.tree_util.keystr(path)} is of no known kind: add its field to PARAMETER_KINDS in model.py"
    )


def parameter_spec(path: tuple[jax.tree_util.KeyEntry, ...]) -> tuple[str | None, ...]:
    """Mesh axes of the parameter at a pytree path; norms are replicated."""
    names = (entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey) and entry.name in _SPECS)
    return next((_SPECS[name] for name in names), ())


def shard_parameters(model: Transformer) -> Transformer:
    """Lays the parameters out over the ambient explicit mesh: FSDP over `data`, tensor-parallel over `model`."""
    return jax.tree.map_with_path(lambda path, leaf: constrain(leaf, *parameter_spec(path)), model)


def cast_parameters(model: Transformer, dtype: str) -> Transformer:
    """The same model with every weight in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def unstack(blocks: Block, num_layers: int) -> list[Block]:
    """The layers one by one. `lax.split` is used because its transpose is a single concatenation."""
    leaves, treedef = jax.tree.flatten(blocks)
    pieces = [jax.lax.split(leaf, (1,) * num_layers, axis=0) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [piece[i][0] for piece in pieces]) for i in range(num_layers)]


def _rematerialised[**P, T](apply: Callable[P, T], remat: RematName) -> Callable[P, T]:
    if remat == "none":
        return apply
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return eqx.filter_checkpoint(apply, policy=policy)


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float) -> Array:
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)


def _flatten_tokens(x: Float[Array, "B S D"]) -> Float[Array, "T D"]:
    """All positions as rows: XLA:CPU multiplies plain matrices, forward and backward, a quarter faster than batches."""
    return jnp.reshape(x, (-1, x.shape[-1]), out_sharding=out_sharding(BATCH_AXES, None))


def _project_back(
    tokens: Float[Array, "T features"], weight: Float[Array, "features D"], like: Float[Array, "B S D"]
) -> Float[Array, "B S D"]:
    """Back to the features and the shape of the residual stream."""
    projected = jnp.matmul(tokens, weight, out_sharding=out_sharding(BATCH_AXES, None))
    return jnp.reshape(projected, like.shape, out_sharding=out_sharding(BATCH_AXES, None, None))
