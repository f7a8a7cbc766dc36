"""What a checkpoint costs the loop: `python -m experiments.benchmarks.checkpoint_stall`.

Windows of equally many steps of the `tiny` model, in turn with a temporary checkpoint at their start and without. A
save blocks the loop only while the state is copied off the devices (the stall); the rest, writing, reading back and
syncing, is done in the background, beside the steps, and shows as a longer window. Prints the medians and two bars: the
stall is at most one step, and one save a minute costs at most 2 % of the throughput.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from levanter.data.text.examples import GrugLmExample
from levanter.grug.attention import AttentionMask
from rich.console import Console
from rich.table import Table

from grug_native.checkpoint.checkpointer import CheckpointPolicy, GrugCheckpointer
from grug_native.checkpoint.metadata import RunIdentity
from grug_native.model import MODEL_PRESETS
from grug_native.optimizer import AdamWConfig, GrugOptimizer
from grug_native.sharding import BATCH_AXES, create_mesh
from grug_native.state import GrugTrainState, init_train_state
from grug_native.train import train_step

BATCH_SIZE = 16
NUM_STEPS = 10_000
"""Of the schedule; not all are trained."""


@dataclass(frozen=True)
class Window:
    """Some steps, and perhaps a save before them."""

    stall: float
    """Seconds that the save blocked."""
    steps: tuple[float, ...]
    """Seconds of each step."""


def make_batch() -> GrugLmExample:
    """Random tokens, laid out over the ambient mesh."""
    seq_len, vocab_size = MODEL_PRESETS["tiny"].max_seq_len, MODEL_PRESETS["tiny"].vocab_size
    tokens = jax.random.randint(jax.random.key(1), (BATCH_SIZE, seq_len), 0, vocab_size)
    weight = (jax.numpy.arange(seq_len) < seq_len - 1).astype(jax.numpy.float32)
    example = GrugLmExample(tokens, jax.numpy.tile(weight, (BATCH_SIZE, 1)), AttentionMask.causal())
    sharding = NamedSharding(create_mesh(BATCH_SIZE), jax.P(BATCH_AXES))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), example)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with `--json`, writes the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="steps a window; must outlast a save in the background")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    optimizer = GrugOptimizer(AdamWConfig(), NUM_STEPS)
    identity = RunIdentity("stall", {}, data_fingerprint="random", tokenizer_digest="none", mesh={})
    plain: list[Window] = []
    saved: list[Window] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        jax.set_mesh(create_mesh(BATCH_SIZE)),
        GrugCheckpointer(Path(folder), identity, CheckpointPolicy()) as checkpointer,
    ):
        state, batch = init_train_state(MODEL_PRESETS["tiny"], optimizer, key=jax.random.key(0)), make_batch()
        step = 0

        def window(state: GrugTrainState, *, save: bool) -> tuple[GrugTrainState, Window]:
            nonlocal step
            started = time.perf_counter()
            if save:
                checkpointer.save_temporary_checkpoint(state, step=step, data_offset=step * BATCH_SIZE)
            stall = time.perf_counter() - started
            durations: list[float] = []
            for _ in range(arguments.steps):
                started = time.perf_counter()
                state, metrics = train_step(optimizer, state, batch)
                jax.block_until_ready(metrics)
                durations.append(time.perf_counter() - started)
                step += 1
            return state, Window(stall, tuple(durations))

        state, first = window(state, save=True)  # imports Orbax, and compiles
        checkpointer.wait()
        for _ in range(arguments.rounds):
            state, with_save = window(state, save=True)
            checkpointer.wait()
            state, without = window(state, save=False)
            saved.append(with_save)
            plain.append(without)
        checkpoint_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    numbers = evaluate(plain, saved)
    numbers |= {"stall of the first save [ms]": 1e3 * first.stall, "checkpoints kept [MB]": checkpoint_bytes / 1e6}
    table = Table("", "median", title=f"tiny on {jax.devices()[0].device_kind}, {arguments.rounds} rounds")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(numbers, indent=1))


def evaluate(plain: Sequence[Window], saved: Sequence[Window]) -> dict[str, float]:
    """The medians and the two bars."""
    step = statistics.median(duration for window in plain for duration in window.steps)
    stall = statistics.median(window.stall for window in saved)
    # Neighbours in time are compared, so that a slow drift of the machine cancels out.
    pairs = zip(saved, plain, strict=True)
    cost = statistics.median(
        with_save.stall + sum(with_save.steps) - sum(without.steps) for with_save, without in pairs
    )
    return {
        "step [ms]": 1e3 * step,
        "stall of a save [ms]": 1e3 * stall,
        "stall / step (bar: 1)": stall / step,
        "whole cost of a save [ms]": 1e3 * cost,
        "throughput lost at one save a minute [%] (bar: 2)": 100 * cost / 60,
    }


if __name__ == "__main__":
    main()
