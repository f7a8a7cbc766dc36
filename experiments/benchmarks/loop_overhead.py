"""What the loop costs: `python -m experiments.benchmarks.loop_overhead`.

The same config and batches through `GrugRunner.fit()`, logging every step, and through the bare compiled step, one
after the other in several rounds of one process, so that neither is older than the other or waits for long. The first
step of each turn is left out: it compiles, or comes after a pause.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from experiments.benchmarks.measure import SHAPES, Spread, make_run, show, spread, write_numbers
from grug_native import GrugNativeRunConfig, GrugRunner
from grug_native.tracker import METRICS_FILE, read_metrics


def measure_fit(config: GrugNativeRunConfig, steps: int) -> list[float]:
    """Seconds of each step but the first of a fresh `fit()`, from the end of a step to the end of the next."""
    GrugRunner(config).fit(stop_after=steps)
    rows = read_metrics(Path(config.output_path) / METRICS_FILE)
    return [float(row["throughput/duration"]) for row in rows if "throughput/duration" in row][1:]


def measure_bare(config: GrugNativeRunConfig, steps: int) -> list[float]:
    """Seconds of each step but the first of the compiled step alone, batches at hand."""
    runner = GrugRunner(config)
    batches = [runner.batch(step) for step in range(steps)]
    state = runner.init_state()
    durations: list[float] = []
    for batch in batches:
        started = time.perf_counter()
        state, metrics = runner.train_step(state, batch)
        jax.block_until_ready((state, metrics))
        durations.append(time.perf_counter() - started)
    return durations[1:]


def evaluate(fit: Sequence[Sequence[float]], bare: Sequence[Sequence[float]]) -> dict[str, Spread | float]:
    """The medians, and the ratio: of all steps, and of the turns of each round.

    Args:
        fit: seconds of the steps of `fit()`, a row a round.
        bare: likewise of the bare step.
    """
    all_fit, all_bare = ([step for turn in turns for step in turn] for turns in (fit, bare))
    pairs = zip(fit, bare, strict=True)
    return {
        "fit() step [ms]": spread([1e3 * step for step in all_fit]),
        "bare step [ms]": spread([1e3 * step for step in all_bare]),
        "fit() / bare, medians of all steps (bar: 1.02)": statistics.median(all_fit) / statistics.median(all_bare),
        "fit() / bare, by round": spread([statistics.median(a) / statistics.median(b) for a, b in pairs]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with `--json`, writes the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be given again; by default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7, help="of a turn")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    shapes: list[str] = arguments.shape or list(SHAPES)
    results: dict[str, dict[str, Spread | float]] = {}
    for shape in shapes:
        fit: list[list[float]] = []
        bare: list[list[float]] = []
        with tempfile.TemporaryDirectory() as folder:
            config = make_run(shape, cache_dir=arguments.cache_dir, folder=Path(folder))
            measure_bare(config, 2)  # compiles
            for number in range(arguments.rounds):
                fit.append(measure_fit(replace(config, output_path=f"{folder}/run-{number}"), arguments.steps))
                bare.append(measure_bare(config, arguments.steps))
        results[shape] = evaluate(fit, bare)
        show(f"{shape}, {arguments.rounds} rounds", ("", "median [10 %, 90 %]"), list(results[shape].items()))
    if arguments.json is not None:
        write_numbers(arguments.json, results)


if __name__ == "__main__":
    main()
