from dataclasses import replace

import jax
import pytest
from levanter.utils.flop_utils import lm_flops_per_token

from grug_native.language_model import abstract_parameters
from grug_native.metrics import Throughput, flops_per_token, parameter_counts, peak_device_flops
from grug_native.model import MODEL_PRESETS, Transformer
from tests.fixtures_run import SMALL_MODEL


def test_counts_are_those_of_the_drawn_model() -> None:
    drawn = Transformer.init(SMALL_MODEL, key=jax.random.key(0))
    counts = parameter_counts(SMALL_MODEL)
    assert counts["total"] == sum(leaf.size for leaf in jax.tree.leaves(drawn))
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")
    assert counts["embed"] == counts["lm_head"] == 300 * 32
    assert counts["blocks.attn_norm"] == 2 * counts["final_norm"] == 2 * 32


def test_an_abstract_model_takes_no_memory() -> None:
    leaves = jax.tree.leaves(abstract_parameters(MODEL_PRESETS["1_2b"]))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert 1.2e9 < sum(leaf.size for leaf in leaves) < 1.6e9


@pytest.mark.parametrize("name", ["tiny", "130m", "1_2b"])
def test_flops_agree_with_levanters_count(name: str) -> None:
    config = MODEL_PRESETS[name]
    theirs = lm_flops_per_token(
        config.hidden_dim,
        config.intermediate_dim,
        config.num_layers,
        config.num_kv_heads,
        config.num_heads,
        config.max_seq_len,
        config.vocab_size,
        glu=True,
    )
    ours = flops_per_token(config, config.max_seq_len)
    # levanter counts the softmax too, three operations a score.
    softmax = 9 * config.num_layers * config.num_heads * config.max_seq_len
    assert ours.full + softmax == pytest.approx(3 * theirs, rel=1e-6)
    assert ours.causal < ours.full


def test_flops_by_hand_with_grouped_and_wide_heads() -> None:
    config = replace(SMALL_MODEL, head_dim=16, num_kv_heads=1)
    attention = 2 * (32 * 64 + 2 * 32 * 16 + 64 * 32)
    matrices = attention + 2 * 3 * 32 * 48 + 32 * 300
    assert flops_per_token(config, 10).full == 6 * matrices + 12 * 2 * 64 * 10
    assert flops_per_token(config, 10).causal == 6 * matrices + 6 * 2 * 64 * 10


def test_throughput_has_levanters_names() -> None:
    flops = flops_per_token(SMALL_MODEL, 32)
    throughput = Throughput(flops, 32, peak_flops=1e9)
    metrics = throughput.metrics(sequences=4, data_offset=40, duration=0.5, loading_time=0.01)
    assert metrics["throughput/tokens_per_second"] == 256
    assert metrics["throughput/examples_per_second"] == 8
    assert metrics["throughput/total_tokens"] == 1280
    assert metrics["throughput/loading_time"] == 0.01
    assert metrics["throughput/mfu"] == pytest.approx(100 * 256 * flops.full / 1e9)
    assert metrics["throughput/mfu_causal"] == pytest.approx(100 * 256 * flops.causal / 1e9)
    unknown = Throughput(flops, 32, peak_flops=None)
    assert "throughput/mfu" not in unknown.metrics(sequences=4, data_offset=4, duration=1.0, loading_time=0.0)


def test_nobody_publishes_the_peak_of_a_cpu() -> None:
    assert peak_device_flops(jax.devices()[0]) is None
