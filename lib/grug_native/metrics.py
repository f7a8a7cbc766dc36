"""Counts and rates: parameters, floating-point operations, throughput, utilisation."""

import resource
from dataclasses import dataclass

import jax

from grug_native.language_model import FlopsPerToken, ModelConfig, abstract_parameters
from grug_native.types import Device


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by the module that they stand in (`embed`, `blocks.attn`, `blocks.mlp`, ...), and their `total`."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(abstract_parameters(config)):
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        module = ".".join(names[:-1]) or names[0]
        counts[module] = counts.get(module, 0) + leaf.size
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: ModelConfig, seq_len: int) -> FlopsPerToken:
    """Operations of a training token at sequences of `seq_len` tokens, as the model says."""
    return abstract_parameters(config).flops_per_token(seq_len)


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

    def metrics(self, *, sequences: int, data_offset: int, duration: float, loading_time: float) -> dict[str, float]:
        """Metrics of one step.

        Args:
            sequences: of this step's global batch.
            data_offset: of all steps up to and including this one.
            duration: seconds from the end of the step before to the end of this one.
            loading_time: seconds the loop waited for this step's batch.
        """
        tokens_per_second = sequences * self.seq_len / duration
        total_tokens = data_offset * self.seq_len
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
