"""What the input costs: `python -m experiments.benchmarks.input_pipeline`.

On the embedded corpus, in levanter's token caches on disk: how many sequences a second the loader makes when nobody
computes, and how many levanter's datasets make, one by one; and in `fit()`, which trains on them, how long the loop
waits for the batch of a step. Of that wait the bar is 0.5 % of the step. The first steps are left out: the first one
compiles, and the loader has its head start then.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, override

from experiments.benchmarks.measure import SHAPES, Spread, interleave, make_run, show, spread, write_numbers
from grug_native import GrugNativeRunConfig, GrugRunner
from grug_native.tracking.jsonl import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from levanter.data.loader import DataLoader
    from levanter.data.text.examples import GrugLmExample

type Results = dict[str, Spread | float]

_LEFT_OUT = 2
"""Steps at the beginning."""


@dataclass(frozen=True)
class Waits:
    """Of a run of `fit()`, step by step, in seconds."""

    waits: tuple[float, ...]
    """For the batch (`throughput/loading_time`)."""
    steps: tuple[float, ...]
    """From the end of a step to the end of the next (`throughput/duration`)."""


def measure_loader(config: GrugNativeRunConfig, batches: int, turns: int) -> dict[str, list[float]]:
    """Seconds a batch of the loader alone, when each is asked for at once, both ways in turns.

    Args:
        config: the run.
        batches: of a turn.
        turns: of each way.

    Returns:
        A value a turn for `"ours"` and `"levanter's"`.
    """
    from levanter.data.dataset import AsyncDataset
    from levanter.data.text.examples import GrugLmExample

    from grug_native.components import RunParts
    from grug_native.data.loader import batch_at, build_train_loader, iter_from_step

    parts = RunParts(config, GrugRunner(config).optimizer)

    class OneByOne(AsyncDataset[GrugLmExample]):
        """The same sequences by a class that the loader does not know, so that levanter makes them."""

        @override
        async def async_len(self) -> int:
            return await parts.dataset.async_len()

        @override
        def is_finite(self) -> bool:
            return parts.dataset.is_finite()

        @override
        async def get_batch(self, indices: Sequence[int]) -> Sequence[GrugLmExample]:
            return await parts.dataset.get_batch(indices)

    one_by_one = build_train_loader(
        OneByOne(), parts.mesh, parts.batch_schedule.schedule, prefetch=config.trainer.prefetch
    )

    def seconds(loader: "DataLoader[GrugLmExample]") -> float:
        stream = iter_from_step(loader, 1)
        started = time.perf_counter()
        for _ in islice(stream, batches):
            pass
        ended = time.perf_counter()
        stream.close()
        return (ended - started) / batches

    loaders = {"ours": parts.loader, "levanter's": one_by_one}
    for loader in loaders.values():
        batch_at(loader, 0)  # opens the caches and compiles
    return interleave({name: partial(seconds, loader) for name, loader in loaders.items()}, turns)


def measure_waits(config: GrugNativeRunConfig, steps: int) -> Waits:
    """Trains the first steps of a run with `fit()`, and reads what it has logged."""
    GrugRunner(config).fit(stop_after=steps)
    rows = read_metrics(Path(config.output_path) / METRICS_FILE)
    rows = [row for row in rows if "throughput/duration" in row][_LEFT_OUT:]
    return Waits(
        tuple(float(row["throughput/loading_time"]) for row in rows),
        tuple(float(row["throughput/duration"]) for row in rows),
    )


def evaluate(loader: Sequence[float], levanters: Sequence[float], size: int, waits: Sequence[Waits]) -> Results:
    """The medians, and the bars.

    Args:
        loader: seconds a batch of the loader alone, a value a turn.
        levanters: the same, of levanter's examples; turn by turn beside those of `loader`.
        size: sequences of a batch.
        waits: of each round's run.
    """
    all_waits = [wait for run in waits for wait in run.waits]
    all_steps = [step for run in waits for step in run.steps]
    shares = [100 * wait / step for wait, step in zip(all_waits, all_steps, strict=True)]
    return {
        "loader alone [sequences/s]": spread([size / seconds for seconds in loader]),
        "one by one, by levanter [sequences/s]": spread([size / seconds for seconds in levanters]),
        "loader / one by one (bar: 4)": spread([b / a for a, b in zip(loader, levanters, strict=True)]),
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
    parser.add_argument("--batches", type=int, default=50, help="of the loader alone, a turn")
    parser.add_argument("--turns", type=int, default=4, help="of the loader alone, a round")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    shapes: list[str] = arguments.shape or list(SHAPES)
    results: dict[str, Results] = {}
    for shape in shapes:
        loader: list[float] = []
        levanters: list[float] = []
        waits: list[Waits] = []
        with tempfile.TemporaryDirectory() as folder:
            for number in range(arguments.rounds):
                own = Path(folder) / f"run-{number}"
                config = make_run(shape, cache_dir=arguments.cache_dir, folder=own, seed=number)
                alone = measure_loader(config, arguments.batches, arguments.turns)
                loader += alone["ours"]
                levanters += alone["levanter's"]
                waits.append(measure_waits(config, arguments.steps))
        results[shape] = evaluate(loader, levanters, SHAPES[shape][1], waits)
        show(f"{shape}, {arguments.rounds} rounds", ("", "median [10 %, 90 %]"), list(results[shape].items()))
    if arguments.json is not None:
        write_numbers(arguments.json, results)


if __name__ == "__main__":
    main()
