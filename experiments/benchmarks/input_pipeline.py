"""What the input costs: `python -m experiments.benchmarks.input_pipeline`.

On the embedded corpus, in levanter's token caches on disk: how many batches a second the loader makes when nobody
computes, and in `fit()`, which trains on them, how long the loop waits for the batch of a step. Of that wait the bar is
0.5 % of the step. The first steps are left out: the first one compiles, and the loader has its head start then.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from experiments.benchmarks.measure import SHAPES, Spread, make_run, show, spread, write_numbers
from grug_native import GrugNativeRunConfig, GrugRunner
from grug_native.tracking.jsonl import METRICS_FILE, read_metrics

_LEFT_OUT = 2
"""Steps at the beginning."""


@dataclass(frozen=True)
class Waits:
    """Of a run of `fit()`, step by step, in seconds."""

    waits: tuple[float, ...]
    """For the batch (`throughput/loading_time`)."""
    steps: tuple[float, ...]
    """From the end of a step to the end of the next (`throughput/duration`)."""


def measure_loader(config: GrugNativeRunConfig, batches: int) -> float:
    """Seconds a batch of the loader alone, when each is asked for at once."""
    from grug_native.components import RunParts
    from grug_native.data.loader import batch_at, iter_from_step

    loader = RunParts(config, GrugRunner(config).optimizer).loader
    batch_at(loader, 0)  # opens the caches and compiles
    stream = iter_from_step(loader, 1)
    started = time.perf_counter()
    for _ in islice(stream, batches):
        pass
    seconds = time.perf_counter() - started
    stream.close()
    return seconds / batches


def measure_waits(config: GrugNativeRunConfig, steps: int) -> Waits:
    """Trains the first steps of a run with `fit()`, and reads what it has logged."""
    GrugRunner(config).fit(stop_after=steps)
    rows = read_metrics(Path(config.output_path) / METRICS_FILE)
    rows = [row for row in rows if "throughput/duration" in row][_LEFT_OUT:]
    return Waits(
        tuple(float(row["throughput/loading_time"]) for row in rows),
        tuple(float(row["throughput/duration"]) for row in rows),
    )


def evaluate(loader: Sequence[float], waits: Sequence[Waits]) -> dict[str, Spread | float]:
    """The medians, and the bar.

    Args:
        loader: seconds a batch of the loader alone, a value a round.
        waits: of each round's run.
    """
    all_waits = [wait for run in waits for wait in run.waits]
    all_steps = [step for run in waits for step in run.steps]
    shares = [100 * wait / step for wait, step in zip(all_waits, all_steps, strict=True)]
    return {
        "loader alone [batches/s]": spread([1 / seconds for seconds in loader]),
        "loader alone, share of a step [%]": 100 * spread(loader).median / spread(all_steps).median,
        "step [ms]": spread([1e3 * step for step in all_steps]),
        "wait for a batch [ms]": spread([1e3 * wait for wait in all_waits]),
        "longest wait [ms]": 1e3 * max(all_waits),
        "wait / step [%] (bar: 0.5)": spread(shares),
        "all waits / all steps [%]": 100 * sum(all_waits) / sum(all_steps),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with `--json`, writes the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be given again; by default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of `fit()`, a round")
    parser.add_argument("--batches", type=int, default=50, help="of the loader alone, a round")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    shapes: list[str] = arguments.shape or list(SHAPES)
    results: dict[str, dict[str, Spread | float]] = {}
    for shape in shapes:
        loader: list[float] = []
        waits: list[Waits] = []
        with tempfile.TemporaryDirectory() as folder:
            for number in range(arguments.rounds):
                own = Path(folder) / f"run-{number}"
                config = make_run(shape, cache_dir=arguments.cache_dir, folder=own, seed=number)
                loader.append(measure_loader(config, arguments.batches))
                waits.append(measure_waits(config, arguments.steps))
        results[shape] = evaluate(loader, waits)
        show(f"{shape}, {arguments.rounds} rounds", ("", "median [10 %, 90 %]"), list(results[shape].items()))
    if arguments.json is not None:
        write_numbers(arguments.json, results)


if __name__ == "__main__":
    main()
