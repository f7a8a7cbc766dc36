"""A step in several passes against one pass: `python -m experiments.benchmarks.microbatches`.

Both compiled steps are called in turn in one process, each with a state of its own, on the same random batch; what they
need is what the compiler says. `--memory-of 1_2b` compiles the step of that size, on whatever backend there is, for its
memory alone: nothing of that size is allocated.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks.measure import SHAPES, interleave, seconds_of, show, spread, write_numbers
from grug_native.attention import Mask
from grug_native.fitting import memory_use
from grug_native.host.process import prepare_process
from grug_native.layers import RematName
from grug_native.model import MODEL_PRESETS, GrugModelConfig
from grug_native.optimizer import AdamWConfig, GrugOptimizer
from grug_native.state import GrugTrainState, init_train_state
from grug_native.train import CompiledStep, GrugStepConfig, PlainBatch, lower_train_step

OPTIMIZER = GrugOptimizer(AdamWConfig(), 1000)


def abstract(tree: Any) -> Any:
    """Shapes and dtypes on the first device."""
    device = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)


def random_batch(model: GrugModelConfig, sequences: int) -> PlainBatch:
    """Tokens that mean nothing."""
    tokens = jax.random.randint(jax.random.key(1), (sequences, model.max_seq_len), 0, model.vocab_size)
    return PlainBatch(tokens, jnp.ones(tokens.shape).at[:, -1].set(0.0), Mask())


def measure_speed(model: GrugModelConfig, sequences: int, passes: int, rounds: int) -> dict[str, Any]:
    """Seconds of the step in one pass and in several, and of what the temporaries take."""
    batch = random_batch(model, sequences)
    calls: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for name, size in (("one pass", None), (f"{passes} passes", sequences // passes)):
        state = init_train_state(model, OPTIMIZER, key=jax.random.key(0))
        step = CompiledStep(OPTIMIZER, abstract(state), abstract(batch), GrugStepConfig(microbatch_size=size))
        use = memory_use(step)
        numbers[f"{name}: temporaries [MiB]"] = None if use is None else use.working / 2**20
        calls[name] = _stepping(step, state, batch)
    seconds = {name: times[1:] for name, times in interleave(calls, rounds + 1).items()}
    one, several = seconds.values()
    numbers |= {f"{name}: step [ms]": spread([1e3 * time for time in times]) for name, times in seconds.items()}
    numbers["several / one, medians (bar: 1.08)"] = statistics.median(several) / statistics.median(one)
    numbers["several / one, by round"] = spread([a / b for a, b in zip(several, one, strict=True)])
    return numbers


def _stepping(step: CompiledStep, state: GrugTrainState, batch: PlainBatch) -> Any:
    def call() -> float:
        def advance() -> GrugTrainState:
            nonlocal state
            state, _ = step(state, batch)
            return state

        return seconds_of(advance)

    return call


def measure_memory(model: GrugModelConfig, sequences: int, passes: int, remat: RematName) -> dict[str, float]:
    """GiB of temporaries of the step in bf16, in one pass and in several."""
    model = replace(model, remat=remat, scan_layers=True, attention="blocked")
    state = abstract(eqx.filter_eval_shape(lambda: init_train_state(model, OPTIMIZER, key=jax.random.key(0))))
    batch = abstract(eqx.filter_eval_shape(lambda: random_batch(model, sequences)))
    found: dict[str, float] = {}
    for name, size in (("one pass", None), (f"{passes} passes", sequences // passes)):
        config = GrugStepConfig(compute_dtype="bfloat16", microbatch_size=size)
        usage = lower_train_step(OPTIMIZER, state, batch, config=config).compile().memory_analysis()
        assert usage is not None
        found[name] = usage.temp_size_in_bytes / 2**30
    one, several = found.values()
    return found | {"several / one (bar: 0.35)": several / one}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="cpu-s", choices=SHAPES)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--memory-of", choices=MODEL_PRESETS, help="a size to compile for its memory, in eight passes")
    parser.add_argument("--memory-batch", type=int, default=16, help="sequences of its batch")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    if arguments.memory_of is not None:
        model = MODEL_PRESETS[arguments.memory_of]
        memory: dict[str, dict[str, float]] = {
            remat: measure_memory(model, arguments.memory_batch, 8, remat) for remat in ("none", "dots", "full")
        }
        columns = ("recomputed", *(f"{name} [GiB]" if "bar" not in name else name for name in memory["none"]))
        show(f"temporaries of {arguments.memory_of}", columns, [(r, *found.values()) for r, found in memory.items()])
        numbers: dict[str, Any] = {arguments.memory_of: memory}
    else:
        model, sequences = SHAPES[arguments.shape]
        numbers = {arguments.shape: measure_speed(model, sequences, arguments.passes, arguments.rounds)}
        show(arguments.shape, ("what", "value"), list(numbers[arguments.shape].items()))
    if arguments.json is not None:
        write_numbers(arguments.json, numbers)


if __name__ == "__main__":
    prepare_process()
    main()
