"""What the loop costs: `python -m experiments.benchmarks.loop_overhead`.

The same config and batches through `GrugRunner.fit()`, logging every step, and through the bare compiled step, one
after the other in several rounds. Prints the median step of each, their ratio, and what a step's dispatch takes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from experiments.speedrun.grugformer_20260129.grugformer_speedrun import build_run
from grug_native import GrugNativeRunConfig, GrugRunner
from grug_native.tracker import read_metrics


def measure_fit(config: GrugNativeRunConfig, steps: int) -> list[float]:
    """Seconds of each step but the first of a fresh `fit()`."""
    GrugRunner(config).fit(stop_after=steps)
    rows = read_metrics(Path(config.output_path) / "metrics.jsonl")
    return [float(row["throughput/duration"]) for row in rows if "throughput/duration" in row][1:]


def measure_bare(config: GrugNativeRunConfig, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step of the compiled step alone, batches at hand, and of its dispatch."""
    runner = GrugRunner(config)
    batches = [runner.batch(step) for step in range(steps)]
    state = runner.init_state()
    durations: list[float] = []
    dispatches: list[float] = []
    for batch in batches:
        started = time.perf_counter()
        state, metrics = runner.train_step(state, batch)
        dispatches.append(time.perf_counter() - started)
        jax.block_until_ready(metrics)
        durations.append(time.perf_counter() - started)
    return durations[1:], dispatches[1:]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with `--json`, writes the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="steps a round")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    base = build_run("tiny")
    trainer = replace(base.trainer, steps_per_checkpoint=None, minutes_per_temporary_checkpoint=None)
    config = replace(base, trainer=trainer, eval=replace(base.eval, max_eval_batches=1, harness=None))
    fit: list[float] = []
    bare: list[float] = []
    dispatch: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            own = replace(config, output_path=f"{folder}/run-{number}")
            fit += measure_fit(own, arguments.steps)
            durations, dispatches = measure_bare(own, arguments.steps)
            bare += durations
            dispatch += dispatches
    numbers = {
        "fit step [ms]": 1e3 * statistics.median(fit),
        "bare step [ms]": 1e3 * statistics.median(bare),
        "fit / bare": statistics.median(fit) / statistics.median(bare),
        "dispatch [ms]": 1e3 * statistics.median(dispatch),
    }
    table = Table("", "median", title=f"tiny on {jax.devices()[0].device_kind}, {arguments.rounds} rounds")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
