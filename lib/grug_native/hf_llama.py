"""The Llama of Hugging Face's `transformers`, in the sizes and parameters of our own model, and the other way round.

Plain data on both sides: `grug_native.model.GrugModelConfig` is made of what is here.
"""

from collections.abc import Mapping
from typing import Any

from grug_native.language_model import HfForm
from grug_native.rotary import GrugRopeConfig

_TENSORS = {
    "embed": "model.embed_tokens.weight",
    "blocks.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.attn.wq": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.attn.wk": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.attn.wv": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.attn.wo": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.mlp.gate": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.mlp.up": "model.layers.{}.mlp.up_proj.weight",
    "blocks.mlp.down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_seq_len": "max_position_embeddings",
}
_LIKE_OURS = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""What a `config.json` has to say, so that our model computes the same; all but the first may be left out."""
_ARCHITECTURE = "LlamaForCausalLM"


def llama_form(sizes: Mapping[str, Any]) -> HfForm:
    """The form of a model of ours.

    Args:
        sizes: the fields of its config, `head_dim` resolved.

    Raises:
        ValueError: if `transformers` refuses such a Llama.
    """
    if sizes["hidden_dim"] % sizes["num_heads"] != 0:
        raise ValueError(
            f"model.hidden_dim={sizes['hidden_dim']} is not divisible by model.num_heads={sizes['num_heads']}: "
            "transformers reads no such Llama, even with a head_dim"
        )
    rope, tied = sizes["rope"], sizes["tie_embeddings"]
    scaling = {
        "rope_type": "llama3",
        "factor": rope["llama3_factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_max_position_embeddings": rope["original_max_seq_len"],
    }
    config = {
        "architectures": [_ARCHITECTURE],
        **_LIKE_OURS,
        **{theirs: sizes[ours] for ours, theirs in _SIZES.items()},
        "rms_norm_eps": sizes["layer_norm_eps"],
        "initializer_range": sizes["initializer_std"],
        # As before transformers 5, which reads it too; older ones take `rope_parameters` for nothing.
        "rope_theta": rope["theta"],
        "rope_scaling": None if rope["llama3_factor"] is None else scaling,
        "tie_word_embeddings": tied,
        "use_cache": True,
    }
    tensors = {ours: theirs for ours, theirs in _TENSORS.items() if not (tied and ours == "lm_head")}
    buffers = (".rotary_emb.inv_freq",)  # Which transformers once saved.
    return HfForm(config, tensors, (*buffers, _TENSORS["lm_head"]) if tied else buffers)


def llama_sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `GrugModelConfig` that computes what a `config.json` describes.

    Raises:
        ValueError: if it describes something else: names the key and its value.
    """
    like_ours = {"architectures": [_ARCHITECTURE], **_LIKE_OURS, "quantization_config": None}
    for key, wanted in like_ours.items():
        found = raw.get(key, None if key == "model_type" else wanted)
        if found != wanted:
            raise ValueError(f"config.json has {key}={found!r}, and our model is a Llama with {key}={wanted!r}")
    counts = {"num_key_value_heads": raw.get("num_attention_heads"), "head_dim": None}
    sizes = {ours: raw.get(theirs, counts.get(theirs)) for ours, theirs in _SIZES.items()}
    for ours, theirs in _SIZES.items():
        # transformers once wrote null for as many key/value heads as heads.
        if sizes[ours] is None and theirs in counts:
            sizes[ours] = counts[theirs]
        if not isinstance(sizes[ours], int) and (sizes[ours] is not None or theirs != "head_dim"):
            raise ValueError(f"config.json has {theirs}={sizes[ours]!r}, and a Llama's is a count")
    return sizes | {
        "layer_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "initializer_std": raw.get("initializer_range", 0.02),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "rope": _rope(raw),
    }


def _rope(raw: Mapping[str, Any]) -> GrugRopeConfig:
    """Of transformers 5, `rope_parameters` has all; before it, `rope_theta` stood beside `rope_scaling`."""
    found: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(found.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    partial = found.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or partial != 1.0:
        raise ValueError(
            f"config.json has rotary embeddings of rope_type={kind!r} and partial_rotary_factor={partial}, and our "
            "model has 'default' and 'llama3', of whole heads"
        )
    if kind == "default":
        return GrugRopeConfig(theta=theta)
    try:
        return GrugRopeConfig(
            theta=theta,
            llama3_factor=float(found["factor"]),
            low_freq_factor=float(found["low_freq_factor"]),
            high_freq_factor=float(found["high_freq_factor"]),
            original_max_seq_len=int(found["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ValueError(f"config.json has rotary embeddings of rope_type='llama3' without {error}") from error
