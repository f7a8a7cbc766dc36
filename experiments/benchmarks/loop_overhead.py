"""What the loop costs: `python -m experiments.benchmarks.loop_overhead`.

The same config and batches through `GrugRunner.fit()`, logging every step, and through the bare compiled step, one
after the other in several rounds of one process, so that neither is older than the other or waits for long. The first
step of each turn is left out: it comes after a pause. Also what the host does for a step, from the call of the compiled
step to its return, and for the very first one, which traces, lowers and compiles, or finds the program in JAX's cache.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from experiments.benchmarks.measure import SHAPES, Spread, make_run, show, spread, write_numbers
from grug_native import GrugNativeRunConfig, GrugRunner
from grug_native.tracking.jsonl import METRICS_FILE, read_metrics


def measure_fit(config: GrugNativeRunConfig, steps: int) -> list[float]:
    """Seconds of each step but the first of a fresh `fit()`, from the end of a step to the end of the next."""
    GrugRunner(config).fit(stop_after=steps)
    rows = read_metrics(Path(config.output_path) / METRICS_FILE)
    return [float(row["throughput/duration"]) for row in rows if "throughput/duration" in row][1:]


@dataclass(frozen=True)
class Bare:
    """Steps of the compiled step alone, batches at hand, in seconds."""

    steps: tuple[float, ...]
    """From the call until the device is done."""
    calls: tuple[float, ...]
    """From the call to its return."""


def measure_bare(config: GrugNativeRunConfig, steps: int) -> Bare:
    """Takes the first steps of a run by hand."""
    runner = GrugRunner(config)
    batches = [runner.batch(step) for step in range(steps)]
    state = runner.init_state()
    durations: list[float] = []
    calls: list[float] = []
    for batch in batches:
        jax.block_until_ready(state)
        started = time.perf_counter()
        state, metrics = runner.train_step(state, batch)
        calls.append(time.perf_counter() - started)
        jax.block_until_ready((state, metrics))
        durations.append(time.perf_counter() - started)
    return Bare(tuple(durations), tuple(calls))


def evaluate(first: Bare, fit: Sequence[Sequence[float]], bare: Sequence[Bare]) -> dict[str, Spread | float]:
    """The medians, and the ratio: of all steps, and of the turns of each round.

    Args:
        first: the first steps of the process.
        fit: seconds of the steps of `fit()`, a row a round.
        bare: the bare steps of each round.
    """
    bare_steps = [turn.steps[1:] for turn in bare]
    all_fit, all_bare = ([step for turn in turns for step in turn] for turns in (fit, bare_steps))
    pairs = zip(fit, bare_steps, strict=True)
    return {
        "fit() step [ms]": spread([1e3 * step for step in all_fit]),
        "bare step [ms]": spread([1e3 * step for step in all_bare]),
        "fit() / bare, medians of all steps (bar: 1.02)": statistics.median(all_fit) / statistics.median(all_bare),
        "fit() / bare, by round": spread([statistics.median(a) / statistics.median(b) for a, b in pairs]),
        "a bare step's call [ms]": spread([1e3 * call for turn in bare for call in turn.calls[1:]]),
        "the first call, compiling [s]": first.calls[0],
        "the first step, all of it [s]": first.steps[0],
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
        bare: list[Bare] = []
        with tempfile.TemporaryDirectory() as folder:
            config = make_run(shape, cache_dir=arguments.cache_dir, folder=Path(folder))
            first = measure_bare(config, 2)
            for number in range(arguments.rounds):
                fit.append(measure_fit(replace(config, output_path=f"{folder}/run-{number}"), arguments.steps))
                bare.append(measure_bare(config, arguments.steps))
        results[shape] = evaluate(first, fit, bare)
        show(f"{shape}, {arguments.rounds} rounds", ("", "median [10 %, 90 %]"), list(results[shape].items()))
    if arguments.json is not None:
        write_numbers(arguments.json, results)


if __name__ == "__main__":
    main()
