"""Time to the held-out bits per byte at which levanter and PyTorch end: `python -m experiments.benchmarks.headline`.

Their optimizer is AdamW with one rate for all parameters. `experiments.benchmarks.optimizers` tuned its rate, decay,
second moment, warm-up and end; its mean over three seeds is the target. The recommended optimizer, of which nothing is
tuned here, is trained with shorter and shorter schedules, as long as its mean over the same seeds reaches the target.

What a step takes is read from the file of `experiments.benchmarks.compare --shape CPU-R --json FILE`, in which the
losses of all contenders agree: so our AdamW ends where theirs do. What the recommended optimizer adds to a step is
measured here.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.benchmarks.measure import show, write_numbers
from experiments.benchmarks.optimizers import MODEL, Bench, Study, Trial, mean_end, measure_cost
from experiments.benchmarks.peers.shapes import SHAPES
from experiments.benchmarks.peers.summary import WARMUP_TURNS, Comparison
from experiments.benchmarks.recipe import STUDY, steps_to
from grug_native.optimizer import AdamWConfig
from grug_native.recommended import recommended_optimizer
from grug_native.schedule import ScheduleConfig

SHAPE = "CPU-R"
TUNED = AdamWConfig(learning_rate=4e-3, weight_decay=0.0, schedule=ScheduleConfig(warmup=0.2))
"""Where `experiments.benchmarks.optimizers` ended with AdamW."""
FACTORS = (1.2, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.2, 2.4)
"""By which the schedule is shortened."""


def seconds_of_steps(comparison: Comparison) -> dict[str, float]:
    """The median over the turns of each contender's seconds a step, which compiling and the first steps are not in."""
    found: dict[str, list[float]] = {}
    for session in comparison.sessions:
        for name, turns in session.items():
            found.setdefault(name, []).extend(turn.step for turn in turns[WARMUP_TURNS:])
    return {name: statistics.median(values) for name, values in found.items()}


def times(seconds: Mapping[str, float], steps: int, ours: int, cost: float) -> dict[str, float]:
    """Seconds of each contender's training to the target.

    Args:
        seconds: of a step, by contender.
        steps: of AdamW.
        ours: of the recommended optimizer.
        cost: a step of the recommended optimizer over one of AdamW.
    """
    return {name: steps * value for name, value in seconds.items()} | {"recommended": ours * cost * seconds["ours_fit"]}


def main(argv: Sequence[str] | None = None, study: Study = STUDY) -> None:
    """Trains what is not in the file yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", type=Path, help=f"file of `compare --shape {SHAPE} --phases rounds --json`")
    parser.add_argument("--runs", type=Path, default=Path("runs/headline.jsonl"), help="file of the finished runs")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--rounds", type=int, default=15, help="of the cost of a step")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    comparison = Comparison.from_json(json.loads(arguments.compared.read_text()))
    if comparison.shape != SHAPE:
        parser.error(f"{arguments.compared} is of shape {comparison.shape}, and must be of {SHAPE}")
    bench = Bench(study, arguments.runs, arguments.cache_dir)
    adamw = Trial(TUNED, study.steps, study.seeds[0])
    ours = Trial(recommended_optimizer(MODEL.hidden_dim), study.steps, study.seeds[0])
    target = mean_end([bench.run(Trial(TUNED, study.steps, seed)) for seed in study.seeds])
    needed = steps_to(bench, ours, target, FACTORS, study.seeds)
    if needed is None:
        raise SystemExit(
            f"the recommended optimizer does not reach {target:.4f} in {study.steps / FACTORS[0]:.0f} steps"
        )
    costs = measure_cost(bench, (adamw, ours), rounds=arguments.rounds)
    cost = statistics.median(b / a for a, b in zip(costs[adamw.name], costs[ours.name], strict=True))
    seconds = seconds_of_steps(comparison)
    found = times(seconds, study.steps, needed, cost)
    show(
        f"to {target:.4f} bits per byte, {SHAPES[SHAPE].tokens:,} tokens a step",
        ("", "ms a step", "steps", "seconds", "over the recommended"),
        [
            (
                name,
                1e3 * total / (steps := needed if name == "recommended" else study.steps),
                steps,
                total,
                total / found["recommended"],
            )
            for name, total in sorted(found.items(), key=lambda item: item[1])
        ],
    )
    if arguments.json is not None:
        write_numbers(arguments.json, {"target": target, "steps": needed, "cost": cost, "seconds": found})


if __name__ == "__main__":
    main()
