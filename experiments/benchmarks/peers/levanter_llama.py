"""Our weights in levanter's Llama, to compare the two."""

from typing import Any

import equinox as eqx
import haliax as hax
import jax
from haliax import Axis, NamedArray
from jaxtyping import Array
from levanter.layers.rotary import DefaultRotaryEmbeddingsConfig, Llama3RotaryEmbeddingsConfig
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel

from grug_native.model import GrugModelConfig, Transformer


def llama_config(config: GrugModelConfig) -> LlamaConfig:
    """The same shapes in levanter's terms."""
    rope = config.rope
    return LlamaConfig(
        max_seq_len=config.max_seq_len,
        hidden_dim=config.hidden_dim,
        intermediate_dim=config.intermediate_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layer_norm_epsilon=config.layer_norm_eps,
        rope=DefaultRotaryEmbeddingsConfig(theta=rope.theta)
        if rope.llama3_factor is None
        else Llama3RotaryEmbeddingsConfig(
            theta=rope.theta,
            factor=rope.llama3_factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position_embeddings=rope.original_max_seq_len,
        ),
        gradient_checkpointing=False,
    )


def to_llama(model: Transformer) -> LlamaLMHeadModel:
    """Levanter's model with the weights of `model`."""
    llama = llama_config(model.config)
    attention = llama.attention_config()
    layers, vocab = llama.Layers, Axis("vocab", model.config.vocab_size)
    embed, mlp, head = llama.Embed, llama.Mlp, attention.HeadSize
    kv, group = attention.KVHeads, attention.QHeadsPerGroup
    empty = eqx.filter_eval_shape(LlamaLMHeadModel.init, vocab, llama, key=jax.random.key(0))

    def named(array: Array, axes: tuple[Axis, ...], like: NamedArray) -> NamedArray:
        return hax.named(array.reshape([axis.size for axis in axes]), axes).rearrange(like.axes)

    def weights(m: Any) -> list[NamedArray]:
        stacked = m.transformer.layers.stacked
        own, feed = stacked.self_attn, stacked.mlp
        projections = [own.q_proj, own.k_proj, own.v_proj, own.o_proj]
        projections += [feed.gate_proj, feed.up_proj, feed.down_proj]
        norms = [stacked.input_layernorm, stacked.post_attention_layernorm, m.transformer.norm]
        return [layer.weight for layer in (*projections, *norms, m.embeddings.token_embeddings, m.lm_head)]

    blocks = model.blocks
    ours = [
        (blocks.attn.wq, (layers, embed, kv, group, head)),
        (blocks.attn.wk, (layers, embed, kv, head)),
        (blocks.attn.wv, (layers, embed, kv, head)),
        (blocks.attn.wo, (layers, Axis("heads", model.config.num_heads), head, embed)),
        (blocks.mlp.gate, (layers, embed, mlp)),
        (blocks.mlp.up, (layers, embed, mlp)),
        (blocks.mlp.down, (layers, mlp, embed)),
        (blocks.attn_norm.weight, (layers, embed)),
        (blocks.mlp_norm.weight, (layers, embed)),
        (model.final_norm.weight, (embed,)),
        (model.embed, (vocab, embed)),
        (model.head, (embed, vocab)),
    ]
    filled = [named(array, axes, like) for (array, axes), like in zip(ours, weights(empty), strict=True)]
    return eqx.tree_at(weights, empty, filled)
