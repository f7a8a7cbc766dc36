"""How the time of a step grows with sequence, layers and batch: `python -m experiments.benchmarks.growth`.

From a small shape, one of the three grows while the others stay. Each shape's compiled step is
timed on random tokens, all of them in turn, in several rounds. Beside the time stand the floating-point operations that
a causal model needs, and how fast they were done. The last column compares the growth of the two from the smallest
shape of the row's kind: below 1 the time grows more slowly, because what a step costs whatever its size weighs less;
above 1 something grows faster than it needs to.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.benchmarks.measure import Spread, interleave, seconds_of, show, spread, write_numbers
from grug_native import AdamWConfig, GrugModelConfig, GrugOptimizer
from grug_native.metrics import flops_per_token
from grug_native.sharding import batch_sharding, create_mesh
from grug_native.state import init_train_state
from grug_native.train import train_step


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the size of a step."""

    sequence: int = 128
    """Tokens of a sequence."""
    layers: int = 2
    """Blocks."""
    batch: int = 8
    """Sequences of a batch."""

    @property
    def model(self) -> GrugModelConfig:
        """The model; all else of it is the same for every shape."""
        return GrugModelConfig(
            vocab_size=2048,
            hidden_dim=256,
            intermediate_dim=704,
            num_layers=self.layers,
            num_heads=4,
            num_kv_heads=4,
            max_seq_len=self.sequence,
        )

    @property
    def flops(self) -> float:
        """Operations of a step."""
        return flops_per_token(self.model, self.sequence).causal * self.batch * self.sequence


POINTS: dict[str, tuple[int, ...]] = {"sequence": (64, 256, 1024), "layers": (1, 4, 8), "batch": (2, 8, 32)}
"""Values of each axis."""


def make_step(shape: Shape) -> Callable[[], float]:
    """A function that trains a step on random tokens and returns the seconds which that took."""
    from levanter.data.text.examples import GrugLmExample
    from levanter.grug.attention import AttentionMask

    mesh, optimizer = create_mesh(shape.batch), GrugOptimizer(AdamWConfig(), 10_000)
    tokens = jax.random.randint(jax.random.key(1), (shape.batch, shape.sequence), 0, shape.model.vocab_size)
    weight = jnp.tile((jnp.arange(shape.sequence) < shape.sequence - 1).astype(jnp.float32), (shape.batch, 1))
    with jax.set_mesh(mesh):
        state = init_train_state(shape.model, optimizer, key=jax.random.key(0))
        batch = jax.device_put(GrugLmExample(tokens, weight, AttentionMask.causal()), batch_sharding(mesh))

    def step() -> object:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(optimizer, state, batch)
        return metrics

    return lambda: seconds_of(step)


def measure(shapes: Sequence[Shape], rounds: int) -> dict[Shape, Spread]:
    """Milliseconds of a step of each shape, in turn; a shape that is named twice is measured once."""
    steps = {shape: make_step(shape) for shape in shapes}
    interleave(steps, 2)  # compiles
    return {shape: spread([1e3 * t for t in times]) for shape, times in interleave(steps, rounds).items()}


@dataclass(frozen=True)
class Row:
    """A shape on its axis."""

    axis: str
    """What grows: `sequence`, `layers` or `batch`."""
    value: int
    """How much of it."""
    milliseconds: Spread
    """Of a step."""
    gflops: float
    """Operations of a step, 1e9."""
    gflops_per_second: float
    """How fast they are done, 1e9."""
    time_growth: float
    """From the first value of the axis."""
    flops_growth: float
    """Likewise."""
    ratio: float
    """Growth of the time over growth of the operations."""


def tabulate(axes: Mapping[str, Mapping[int, Shape]], times: Mapping[Shape, Spread]) -> list[Row]:
    """The rows of all axes.

    Args:
        axes: of each axis the shapes by their values.
        times: of each shape the milliseconds of a step.
    """
    rows: list[Row] = []
    for axis, shapes in axes.items():
        first = next(iter(shapes.values()))
        for value, shape in shapes.items():
            time_growth = times[shape].median / times[first].median
            flops_growth = shape.flops / first.flops
            rows.append(
                Row(
                    axis=axis,
                    value=value,
                    milliseconds=times[shape],
                    gflops=shape.flops / 1e9,
                    gflops_per_second=shape.flops / times[shape].median / 1e6,
                    time_growth=time_growth,
                    flops_growth=flops_growth,
                    ratio=time_growth / flops_growth,
                )
            )
    return rows


def main(argv: Sequence[str] | None = None, points: Mapping[str, Sequence[int]] = POINTS) -> None:
    """Measures and prints; with `--json`, writes the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    axes = {axis: {value: replace(Shape(), **{axis: value}) for value in values} for axis, values in points.items()}
    shapes = [shape for values in axes.values() for shape in values.values()]
    rows = tabulate(axes, measure(shapes, arguments.rounds))
    columns = ("axis", "value", "step [ms]", "GFLOP", "GFLOP/s", "time x", "FLOPs x", "time x / FLOPs x")
    cells = [tuple(getattr(row, field.name) for field in fields(row)) for row in rows]
    show(f"growth from {Shape()}, {arguments.rounds} rounds", columns, cells)
    if arguments.json is not None:
        write_numbers(arguments.json, {"base": asdict(Shape()), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
