"""Counts and rates: parameters, floating-point operations, throughput, utilisation."""

import resource
from dataclasses import dataclass

import equinox as eqx
import jax

from grug_native.model import Transformer
from grug_native.model_config import GrugModelConfig
from grug_native.types import Device


def abstract_parameters(config: GrugModelConfig) -> Transformer:
    """The model as shapes and dtypes: nothing is drawn and nothing allocated."""
    return eqx.filter_eval_shape(Transformer.init, config, key=jax.random.key(0))


def parameter_counts(config: GrugModelConfig) -> dict[str, int]:
    """Parameters by module (`embed`, `attention`, `mlp`, `norms`, `lm_head`), and their `total`."""
    model = abstract_parameters(config)
    counts = {
        "embed": model.embed.size,
        "attention": _size(model.blocks.attn),
        "mlp": _size(model.blocks.mlp),
        "norms": _size((model.blocks.attn_norm, model.blocks.mlp_norm, model.final_norm)),
        "lm_head": model.lm_head.size,
    }
    return counts | {"total": sum(counts.values())}


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of one training token, forward and backward, without recomputation."""

    full: float
    """`6 M + 12 L Q S`: attention counted over the whole square, as levanter and PaLM do."""
    causal: float
    """`6 M + 6 L Q S`: half of the square, which is what a causal model needs."""


def flops_per_token(config: GrugModelConfig, seq_len: int) -> FlopsPerToken:
    """Operations per token at sequences of `seq_len` tokens; `M` counts all matrices but the embedding.

    References:
        Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B).
    """
    counts = parameter_counts(config)
    matrices = counts["attention"] + counts["mlp"] + counts["lm_head"]
    scores = config.num_layers * config.num_heads * config.features_per_head * seq_len
    return FlopsPerToken(full=6.0 * matrices + 12.0 * scores, causal=6.0 * matrices + 6.0 * scores)


def peak_device_flops(device: Device) -> float | None:
    """The maker's dense bf16 operations per second of a device, None where nobody publishes them (a CPU)."""
    from fray.device_flops import device_flops_for_jax_device

    return None if device.platform == "cpu" else device_flops_for_jax_device(device.device_kind)


def peak_memory() -> int:
    """Most bytes that this process has held so far on its first device; with a CPU, on the host."""
    stats = jax.local_devices()[0].memory_stats()
    # Linux counts the host's in KiB.
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Throughput:
    """Turns the time of a step into levanter's `throughput/*` metrics."""

    flops: FlopsPerToken
    """Of the model, at this length of sequence."""
    seq_len: int
    """Tokens of a sequence."""
    peak_flops: float | None
    """Operations per second of all devices together; None leaves `throughput/mfu` out."""

    def metrics(
        self, *, sequences: int, total_sequences: int, duration: float, loading_time: float
    ) -> dict[str, float]:
        """Metrics of one step.

        Args:
            sequences: of this step's global batch.
            total_sequences: of all steps up to and including this one.
            duration: seconds from the end of the step before to the end of this one.
            loading_time: seconds the loop waited for this step's batch.
        """
        tokens_per_second = sequences * self.seq_len / duration
        total_tokens = total_sequences * self.seq_len
        metrics = {
            "throughput/duration": duration,
            "throughput/loading_time": loading_time,
            "throughput/examples_per_second": sequences / duration,
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/gflops_per_second": tokens_per_second * self.flops.full / 1e9,
            "throughput/total_tokens": total_tokens,
            "throughput/total_gflops": total_tokens * self.flops.full / 1e9,
        }
        if self.peak_flops is not None:
            metrics["throughput/mfu"] = 100 * tokens_per_second * self.flops.full / self.peak_flops
            metrics["throughput/mfu_causal"] = 100 * tokens_per_second * self.flops.causal / self.peak_flops
        return metrics


def _size(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
