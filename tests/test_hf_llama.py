from dataclasses import replace
from typing import Any

import pytest

from experiments.variants.modded import ModdedConfig
from grug_native.language_model import hf_form
from grug_native.model import GrugModelConfig
from grug_native.rotary import GrugRopeConfig
from tests.fixtures_run import SMALL_MODEL

LLAMA3 = GrugRopeConfig(theta=500_000.0, llama3_factor=8.0, low_freq_factor=1.5, original_max_seq_len=16)
CONFIGS = {
    "gqa": SMALL_MODEL,
    "mha": replace(SMALL_MODEL, num_kv_heads=4, layer_norm_eps=1e-6),
    "tied": replace(SMALL_MODEL, tie_embeddings=True),
    "wide-heads": replace(SMALL_MODEL, head_dim=16, rope=GrugRopeConfig(theta=77.0)),
    "llama3": replace(SMALL_MODEL, rope=LLAMA3),
}
SAVED: dict[str, Any] = dict(SMALL_MODEL.to_hf().config)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_what_is_read(name: str) -> None:
    config = replace(CONFIGS[name], head_dim=CONFIGS[name].features_per_head)
    assert GrugModelConfig.from_hf(config.to_hf().config) == config


def test_a_config_of_transformers_5_and_one_of_llama_2() -> None:
    new = {k: v for k, v in SAVED.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.5}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    assert GrugModelConfig.from_hf(new | {"rope_parameters": scaling}).rope == LLAMA3
    old = {k: v for k, v in new.items() if k not in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")}
    read = GrugModelConfig.from_hf(old)
    assert (read.num_kv_heads, read.features_per_head, read.rope.theta) == (4, 8, 10_000.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2', and our model is a Llama with model_type='llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures=\['LlamaForSequenceClassification'\]"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3' without 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ({"hidden_size": "32"}, "hidden_size='32', and a Llama's is a count"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    ],
)
def test_what_our_model_does_not_compute_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GrugModelConfig.from_hf(SAVED | change)


def test_a_model_without_a_form_says_what_to_write() -> None:
    variant = ModdedConfig(vocab_size=300, hidden_dim=32, num_layers=2, num_heads=4, max_seq_len=32)
    with pytest.raises(
        ValueError, match=r"modded:ModdedConfig has no form .* give the class to_hf\(\) and from_hf\(\)"
    ):
        hf_form(variant)
    odd = replace(SMALL_MODEL, num_heads=6, num_kv_heads=2, head_dim=8)
    with pytest.raises(
        ValueError, match=r"hidden_dim=32 is not divisible by model\.num_heads=6: transformers reads no"
    ):
        hf_form(odd)
