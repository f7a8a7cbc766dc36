"""Our model and optimizer at a shape of the comparison. Imports nothing of levanter."""

import os
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from experiments.benchmarks.peers import shapes
from experiments.benchmarks.peers.gate import Gate
from experiments.benchmarks.peers.shapes import Shape
from grug_native.model import GrugModelConfig
from grug_native.optimizer import AdamWConfig, GrugOptimizer
from grug_native.rotary import GrugRopeConfig
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import use_cpu_devices

NUM_TRAIN_STEPS = 1_000_000
"""Of the runs whose loops are held and never end."""


class CausalMask(eqx.Module):
    """levanter's `AttentionMask.causal()`, without levanter."""

    is_causal: bool = eqx.field(static=True, default=True)
    """Whether a position sees none after it."""
    segment_ids: tuple[Array, Array] | None = None
    """Documents of queries and keys, (B, S) each; None for one a row."""
    sliding_window: int | None = eqx.field(static=True, default=None)
    """Positions that are seen back; None for all."""


class Batch(eqx.Module):
    """levanter's `GrugLmExample`, without levanter."""

    tokens: Int[Array, "B S"]
    loss_weight: Float[Array, "B S"]
    attn_mask: CausalMask = CausalMask()
    """Who sees whom."""


def model_config(shape: Shape, **fields: Any) -> GrugModelConfig:
    """Our model; what `fields` do not name, such as the kernels, is left to its defaults."""
    return GrugModelConfig(
        vocab_size=shape.vocab_size,
        hidden_dim=shape.hidden_dim,
        intermediate_dim=shape.intermediate_dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        max_seq_len=shape.seq_len,
        layer_norm_eps=shapes.NORM_EPS,
        rope=GrugRopeConfig(theta=shapes.ROPE_THETA),
        **fields,
    )


def optimizer_config() -> AdamWConfig:
    """AdamW at a constant rate."""
    return AdamWConfig(
        learning_rate=shapes.LEARNING_RATE,
        weight_decay=shapes.WEIGHT_DECAY,
        beta1=shapes.BETAS[0],
        beta2=shapes.BETAS[1],
        epsilon=shapes.EPSILON,
        max_grad_norm=shapes.MAX_GRAD_NORM,
        schedule=ScheduleConfig(shape="constant", warmup=0),
    )


def optimizer() -> GrugOptimizer:
    """The optimizer of a run without end."""
    return GrugOptimizer(optimizer_config(), NUM_TRAIN_STEPS)


def open_gate(cpu_devices: int = 1) -> Gate:
    """The gate of a worker that uses JAX; call it before anything else touches a device."""
    if cpu_devices > 1:
        use_cpu_devices(cpu_devices)
    device = jax.devices()[0]
    about = {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "jax": jax.__version__,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }

    def peak_device() -> int | None:
        return None if device.platform == "cpu" else (device.memory_stats() or {}).get("peak_bytes_in_use")

    return Gate(lambda: jax.block_until_ready(jax.live_arrays()), peak_device, about)
