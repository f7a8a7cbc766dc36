"""The train step at scale, on paper: `python -m experiments.benchmarks.scale --devices 8 64 256`.

Compiles the step of one size of the speedrun for so many devices, none of which is there, and reads the compiled
program: the operations and the memory of a device, and the bytes that it receives in a step beside the ideal of FSDP
(all weights gathered twice, their gradients reduce-scattered once). The compiler is that of the CPU.

A program is refused that gathers anything but weights, gathers one twice in a pass, or sums a gradient whole on every
device.
"""

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.hlo import Collective, read_program
from experiments.speedrun.grugformer_20260129.grugformer_speedrun import SIZES, build_run
from grug_native import GrugNativeRunConfig, GrugRunner
from grug_native.components import RunParts
from grug_native.layers import RematName
from grug_native.metrics import abstract_parameters, flops_per_token, parameter_counts
from grug_native.model import GrugModelConfig, Transformer
from grug_native.sharding import create_mesh, use_cpu_devices
from grug_native.types import Device


@dataclass(frozen=True, kw_only=True)
class ScaleReport:
    """What the compiled step says, for one number of devices. Bytes and operations are those of one device and step."""

    devices: int
    """Devices, all of them on the `data` axis."""
    batch: int
    """Sequences of a step over all devices."""
    flops: float
    """Operations of the matrix products."""
    model_flops: float
    """Operations that the model needs, attention over the full square, nothing recomputed."""
    expected_flops: float
    """`model_flops`, and what `model.remat` says is to be recomputed."""
    dtype: str
    """What weights and gradients travel as: XLA:CPU widens bf16 to f32."""
    received: dict[str, float]
    """Bytes received, by kind of collective."""
    ideal: float
    """Bytes that FSDP has to receive in `dtype`: every weight but the norms twice, its gradient once."""
    state_bytes: int
    """Parameters, optimizer state and batch."""
    peak_bytes: int
    """The same, and all that the step needs beside them, as this compiler plans it."""

    @property
    def of_ideal(self) -> float:
        """Bytes received, as a part of the ideal."""
        return sum(self.received.values()) / self.ideal


def check_collectives(collectives: Iterable[Collective], model: GrugModelConfig) -> None:
    """Refuses what FSDP does not ask for.

    Raises:
        ValueError: naming the operation, if anything but a weight is gathered, a weight is gathered twice in a pass or
            not at all in the forward pass, its gradient is not scattered exactly once, or anything larger than the
            norms' gradients is summed whole or moved otherwise.
    """
    weights, norms = _weights(model), model.num_layers * model.hidden_dim
    forward, backward, scattered = (Counter[tuple[int, ...]]() for _ in range(3))
    for each in collectives:
        if each.kind == "all-gather":
            shape = _sorted(each.result.dims)
            if shape not in weights:
                raise ValueError(f"{each.result} is gathered, and is no weight: {each.origin}")
            (backward if each.backward else forward)[shape] += each.times
        elif each.kind == "reduce-scatter":
            shape = _whole(each, weights)
            if shape is None:
                raise ValueError(f"{each.result} is scattered, and is no gradient of a weight: {each.origin}")
            scattered[shape] += each.times
        elif each.result.size > norms:
            done = "summed whole on every device" if each.kind == "all-reduce" else f"moved by {each.kind}"
            raise ValueError(f"{each.result} is {done}: {each.origin}")
    for name, found in (("gathered in the forward pass", forward), ("scattered", scattered)):
        if found != weights:
            raise ValueError(f"weights by shape are {dict(weights)}, but {dict(found)} are {name}")
    if not backward <= weights:
        raise ValueError(f"weights by shape are {dict(weights)}, but the backward pass gathers {dict(backward)}")


def _weights(model: GrugModelConfig) -> Counter[tuple[int, ...]]:
    """How many weights there are of each shape, layer by layer; a shape and its transpose are one, norms are none."""
    params = abstract_parameters(model)
    assert isinstance(params, Transformer)
    blocks = [leaf.shape[1:] for leaf in jax.tree.leaves(params.blocks)] * model.num_layers
    ends = [leaf.shape for leaf in (params.embed, params.lm_head) if leaf is not None]
    return Counter(_sorted(shape) for shape in (*ends, *blocks) if len(shape) > 1)


def _sorted(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size > 1))


def _whole(scatter: Collective, weights: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the weight whose gradient is scattered, one of its sizes being divided by the devices."""
    dims = [size for size in scatter.result.dims if size > 1]
    candidates = [_sorted([*dims[:i], dims[i] * scatter.group, *dims[i + 1 :]]) for i in range(len(dims))]
    return next((shape for shape in candidates if shape in weights), None)


def report(config: GrugNativeRunConfig, devices: Sequence[Device]) -> ScaleReport:
    """Compiles and reads the step of a run on devices that may be abstract.

    Raises:
        ValueError: as `check_collectives`.
    """
    parts = RunParts(config, GrugRunner(config).optimizer)
    batch, model = config.trainer.batch_size_at(0), config.model
    assert isinstance(model, GrugModelConfig)
    parts.mesh = create_mesh(batch, config.trainer.mesh, devices=devices)
    compiled = parts.compiled_step().executable
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    program = read_program(text)
    check_collectives(program.collectives, model)
    kinds = sorted({each.kind for each in program.collectives})
    received = {kind: sum(each.received for each in program.collectives if each.kind == kind) for kind in kinds}
    (dtype,) = {each.result.dtype for each in program.collectives if each.kind == "all-gather"}
    width = jax.numpy.dtype({"f32": "float32", "bf16": "bfloat16"}[dtype]).itemsize
    weights = sum(count * prod(shape) for shape, count in _weights(model).items())
    tokens = batch * config.seq_len / len(devices)
    flops = flops_per_token(model, config.seq_len).full
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return ScaleReport(
        devices=len(devices),
        batch=batch,
        flops=program.dot_flops,
        model_flops=tokens * flops,
        expected_flops=tokens * (flops + _recomputed_flops(model, config.seq_len)),
        dtype=dtype,
        received=dict(received),
        ideal=3 * width * weights * (len(devices) - 1) / len(devices),
        state_bytes=memory.argument_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes,
    )


def _recomputed_flops(model: GrugModelConfig, seq_len: int) -> float:
    """Operations per token of the products that the backward pass repeats: attention's, or all but a block's last."""
    attention = 4.0 * model.num_layers * model.num_heads * model.features_per_head * seq_len
    last = model.num_layers * model.intermediate_dim * model.hidden_dim
    counts = parameter_counts(model)
    matrices = 2.0 * (counts["blocks.attn"] + counts["blocks.mlp"] - last)
    return {"none": 0.0, "dots": attention, "full": attention + matrices}[model.remat]


def report_on(devices: int, size: str, layers: int | None, remat: RematName | None) -> ScaleReport:
    """`report` on a size of the speedrun, at least one sequence a device, in a process that has used no device yet.

    Args:
        devices: that the CPU is split into.
        size: as in `build_run`.
        layers: instead of the size's.
        remat: likewise.
    """
    from levanter.data.text.datasets import LmDataConfig

    use_cpu_devices(devices)
    config = build_run(size, data=LmDataConfig())
    # Attention over the whole square, which the count of operations knows; kernels skip the masked half.
    assert isinstance(config.model, GrugModelConfig)
    assert isinstance(config.model, GrugModelConfig)
    model = replace(config.model, attention="reference", scan_layers=True, remat=remat or "dots")
    model = replace(model, num_layers=layers or model.num_layers)
    batch = max(config.trainer.batch_size_at(0), devices)
    trainer = replace(config.trainer, train_batch_size=batch, compute_dtype="bfloat16")
    return report(replace(config, model=model, trainer=trainer), jax.devices())


def print_reports(title: str, reports: Sequence[ScaleReport]) -> None:
    """Prints a column for each number of devices."""
    rows: dict[str, list[str]] = {"sequences of a step": [f"{each.batch}" for each in reports]}
    rows["TFLOPs"] = [f"{each.flops / 1e12:.2f}" for each in reports]
    rows["  of those expected"] = [f"{each.flops / each.expected_flops:.3f}" for each in reports]
    rows["  expected, of the model's"] = [f"{each.expected_flops / each.model_flops:.3f}" for each in reports]
    for kind in sorted({kind for each in reports for kind in each.received}):
        rows[f"GB by {kind}"] = [f"{each.received.get(kind, 0) / 1e9:.4f}" for each in reports]
    rows["  all, of the FSDP ideal"] = [f"{each.of_ideal:.3f} in {each.dtype}" for each in reports]
    rows["GiB of state"] = [f"{each.state_bytes / 2**30:.2f}" for each in reports]
    rows["GiB at the peak"] = [f"{each.peak_bytes / 2**30:.2f}" for each in reports]
    table = Table("", *(f"{each.devices} devices" for each in reports), title=title, title_justify="left")
    for name, values in rows.items():
        table.add_row(name, *values)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Reports, each number of devices in a process of its own, as JAX fixes it when it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1_2b")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--layers", type=int, help="fewer layers than the size has, to be quick")
    parser.add_argument("--remat", choices=["none", "dots", "full"], help="what to recompute (default: dots)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        options = (arguments.size, arguments.layers, arguments.remat)
        reports = [fresh.submit(report_on, devices, *options).result() for devices in arguments.devices]
    print_reports(f"One step of {arguments.size}, on one device", reports)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(each) for each in reports], indent=1))


if __name__ == "__main__":
    main()
