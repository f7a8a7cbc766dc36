"""Attention and cross-entropy alone, each implementation in turns: `python -m experiments.benchmarks.kernels`.

Forward, and forward with backward, at the sizes of one layer and of the head of a shape of `compare`, through the
public functions of `grug_native.attention` and `grug_native.loss`. GFLOP/s count what the mathematics needs: two
matrix products forward and four backward for attention, and half of each square as it is causal; one forward and two
backward for the cross-entropy. What an implementation computes beyond that shows as a lower rate.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import cast, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.benchmarks.compare import environment
from experiments.benchmarks.peers import ours
from experiments.benchmarks.peers.shapes import SHAPES, Shape
from experiments.benchmarks.peers.summary import spread
from grug_native.attention import ATTENTION_NAMES, AttentionName, attention
from grug_native.host.process import prepare_process
from grug_native.language_model import Aux, LanguageModel
from grug_native.layers import to_logits
from grug_native.loss import ComputeDtype, CrossEntropyName, next_token_loss
from grug_native.model import GrugModelConfig
from grug_native.sharding import use_cpu_devices
from grug_native.types import AttentionMask

BACKENDS: dict[AttentionName, str] = {"cudnn": "gpu", "gpu_fa4_cute": "gpu", "tpu_splash": "tpu"}
"""Implementations that run on one backend only."""

FROM_LEVANTER: tuple[AttentionName, ...] = ("xla_flash", "gpu_fa4_cute", "tpu_splash")
"""Implementations that want levanter's own mask, and so its package."""

CROSS_ENTROPY_NAMES: tuple[CrossEntropyName, ...] = get_args(CrossEntropyName)


@dataclass(frozen=True)
class Kernel:
    """Something to time."""

    name: str
    """What the table calls it."""
    call: Callable[[], object]
    """Runs it once."""
    operations: float
    """Floating-point operations of a call."""


class Head(eqx.Module):
    """What `next_token_loss` asks of a model, with hidden states that are there already."""

    states: Float[Array, "B S D"]
    lm_head: Float[Array, "D V"]
    config: GrugModelConfig = eqx.field(static=True)

    def hidden(self, tokens: Int[Array, "B S"], mask: AttentionMask) -> tuple[Float[Array, "B S D"], Aux, None]:
        """The hidden states."""
        return self.states, Aux(), None

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """The products of a `Transformer`."""
        return to_logits(hidden, self.lm_head)


def attention_kernels(shape: Shape, dtype: ComputeDtype) -> Iterator[Kernel]:
    """Each implementation that runs on this backend, forward, and forward with backward."""
    sizes = (shape.batch_size, shape.seq_len, shape.num_heads, shape.hidden_dim // shape.num_heads)
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, *sizes), jnp.float32).astype(dtype)
    operations = 2.0 * shape.batch_size * shape.seq_len**2 * shape.hidden_dim
    for name in ATTENTION_NAMES:
        if BACKENDS.get(name, jax.default_backend()) == jax.default_backend():
            forward, both = _attention_functions(name)
            yield Kernel(f"attention {name}, forward", partial(forward, q, k, v), operations)
            yield Kernel(f"attention {name}, both", partial(both, q, k, v, cotangent), 3 * operations)


def _attention_functions(name: AttentionName) -> tuple[Callable[..., Array], Callable[..., tuple[Array, ...]]]:
    def forward(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, _mask(name), implementation=name)

    def both(q: Array, k: Array, v: Array, cotangent: Array) -> tuple[Array, ...]:
        out, backward = jax.vjp(forward, q, k, v)
        return out, *backward(cotangent)

    return jax.jit(forward), jax.jit(both)


def _mask(name: AttentionName) -> AttentionMask:
    if name not in FROM_LEVANTER:
        return ours.CausalMask()
    from levanter.grug.attention import AttentionMask as LevanterMask

    return LevanterMask.causal()


def cross_entropy_kernels(shape: Shape, dtype: ComputeDtype) -> Iterator[Kernel]:
    """Each implementation, forward, and forward with backward."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (shape.batch_size, shape.seq_len, shape.hidden_dim), jnp.float32)
    head = 0.02 * jax.random.normal(keys[1], (shape.hidden_dim, shape.vocab_size), jnp.float32)
    tokens = jax.random.randint(keys[2], (shape.batch_size, shape.seq_len), 0, shape.vocab_size)
    batch = ours.Batch(tokens, jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0))
    operations = 2.0 * shape.tokens * shape.hidden_dim * shape.vocab_size
    config = ours.model_config(shape)
    for name in CROSS_ENTROPY_NAMES:

        def loss(hidden: Array, head: Array, batch: ours.Batch, name: CrossEntropyName = name) -> Array:
            model = cast(LanguageModel, Head(hidden, head, config))
            return next_token_loss(model, batch, compute_dtype=dtype, cross_entropy=name)[0]

        yield Kernel(f"cross-entropy {name}, forward", partial(jax.jit(loss), hidden, head, batch), operations)
        both = partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), hidden, head, batch)
        yield Kernel(f"cross-entropy {name}, both", both, 3 * operations)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="CPU-S", choices=SHAPES)
    parser.add_argument("--only", default="", help="part of the names of the kernels to time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-devices", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    if arguments.cpu_devices > 1:
        use_cpu_devices(arguments.cpu_devices)
    shape = SHAPES[arguments.shape]
    dtype: ComputeDtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    everything = chain(attention_kernels(shape, dtype), cross_entropy_kernels(shape, dtype))
    kernels = [kernel for kernel in everything if arguments.only in kernel.name]
    # Twice: importing levanter, on the way, changes settings of JAX, and what was compiled before is compiled anew.
    for kernel in kernels * 2:
        jax.block_until_ready(kernel.call())
    seconds: dict[str, list[float]] = {kernel.name: [] for kernel in kernels}
    for _ in range(arguments.rounds):
        for kernel in kernels:
            started = time.perf_counter()
            jax.block_until_ready(kernel.call())
            seconds[kernel.name].append(time.perf_counter() - started)
    print(f"{arguments.shape}: {shape}, {dtype} on {jax.device_count()} x {jax.devices()[0].device_kind}\n")
    print("| kernel | ms | GFLOP/s |\n| --- | --- | --- |")
    for kernel in kernels:
        times = seconds[kernel.name]
        rate = kernel.operations / statistics.median(times) / 1e9
        print(f"| {kernel.name} | {spread([1e3 * value for value in times], '.1f')} | {rate:,.0f} |")
    if arguments.json is not None:
        numbers = {"shape": arguments.shape, "environment": environment(), "seconds": seconds}
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    prepare_process()
    main()
