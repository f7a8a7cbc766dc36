"""Ways to train the same model, tuned alike, on text that is held out: `python -m experiments.benchmarks.recipe`.

Every family of optimizers gets the same trials: points drawn at random from the same ranges (only the range of the
matrices' rate is the family's own), halved successively: all of them with a short schedule, the better half with
one twice as long, and so on (Jamieson and Talwalkar 2016, arXiv 1502.07943). The best is trained with seeds that chose
nothing. Runs are kept in a file as those of `experiments.benchmarks.optimizers` are, and none is trained twice.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.benchmarks.measure import show, write_numbers
from experiments.benchmarks.optimizers import Bench, OutOfRuns, Study, Trial, mean_end
from experiments.variants.recipe import Decay, MatrixUpdate, RecipeConfig
from grug_native import AdamWConfig
from grug_native.optimizer import GroupConfig
from grug_native.schedule import ScheduleConfig

ADAM_RATES, MUON_RATES, SPHERE_RATES = (5e-4, 16e-3), (2e-3, 64e-3), (2e-3, 64e-3)


@dataclass(frozen=True)
class Family:
    """Optimizers that differ in numbers only."""

    update: MatrixUpdate
    decay: Decay
    rates: tuple[float, float]
    """From which the matrices' rate is drawn."""
    grouped: bool = True
    """Whether embedding, head and norms have rates of their own."""


FAMILIES = {
    "adamw": Family("adam", "plain", ADAM_RATES, grouped=False),
    "adamw, groups": Family("adam", "plain", ADAM_RATES),
    "adamw, groups, cautious decay": Family("adam", "cautious", ADAM_RATES),
    "adamh, groups": Family("adam", "sphere", SPHERE_RATES),
    "muon, groups": Family("muon", "plain", MUON_RATES),
    "muon, polar express, groups": Family("polar", "plain", MUON_RATES),
    "normuon, groups": Family("normuon", "plain", MUON_RATES),
    "normuon, groups, cautious decay": Family("normuon", "cautious", MUON_RATES),
    "muonh, groups": Family("muon", "sphere", SPHERE_RATES),
    "soap, groups": Family("soap", "plain", ADAM_RATES),
}
STUDY = Study()
BASELINE = "adamw, groups"
"""What the others are measured against; always among those that are tried."""

RUNGS = ((8, 100), (4, 200), (2, 300))
"""Trials, and the steps of each: of the first rung, of the next, and so on."""


def drawn(family: Family, number: int) -> RecipeConfig:
    """Point `number` of a family: the same for all families, but for the range of the matrices' rate."""
    rng = np.random.default_rng(number)

    def rate(low: float, high: float) -> float:
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")

    own = rate(*family.rates)
    embedding, head, norm = rate(4e-3, 128e-3), rate(1e-3, 64e-3), rate(1e-3, 32e-3)
    momentum, beta2, beta1_of_rest, beta2_of_rest = (
        float(rng.choice(values)) for values in ((0.85, 0.9, 0.95), (0.9, 0.95, 0.99), (0.8, 0.9), (0.95, 0.99))
    )
    schedule = ScheduleConfig(warmup=float(rng.choice((0.05, 0.1, 0.2))), min_lr_ratio=float(rng.choice((0.0, 0.1))))
    decay = float(rng.choice((0.0, 0.1, 0.3)))
    rest = AdamWConfig(
        learning_rate=own, schedule=schedule, weight_decay=decay, beta1=momentum, beta2=beta2, max_grad_norm=None
    )
    if family.grouped:
        rest = replace(
            rest,
            beta1=beta1_of_rest,
            beta2=beta2_of_rest,
            embedding=GroupConfig(learning_rate=embedding, weight_decay=0.0),
            head=GroupConfig(learning_rate=head, weight_decay=0.0),
            norm=GroupConfig(learning_rate=norm, weight_decay=0.0),
        )
    return RecipeConfig(
        update=family.update,
        decay=family.decay,
        learning_rate=own,
        schedule=schedule,
        weight_decay=decay,
        momentum=momentum,
        beta2=beta2,
        rest=rest,
    )


def halve(
    bench: Bench, family: Family, rungs: Sequence[tuple[int, int]], seed: int
) -> tuple[Trial, dict[Trial, float]]:
    """Finds a family's best point.

    Args:
        bench: where trials are run.
        family: from which points are drawn.
        rungs: trials and steps.
        seed: of all trials.

    Returns:
        The best of the last rung, and of all trials the bits per byte at the end.
    """
    ends: dict[Trial, float] = {}
    points = [drawn(family, number) for number in range(rungs[0][0])]
    trials: list[Trial] = []
    for kept, steps in rungs:
        trials = [Trial(point, steps, seed) for point in points[:kept]]
        ends |= {trial: bench.run(trial).final for trial in trials}
        trials.sort(key=lambda trial: ends[trial])
        points = [trial.optimizer for trial in trials if isinstance(trial.optimizer, RecipeConfig)]
    return trials[0], ends


def steps_to(bench: Bench, trial: Trial, target: float, lengths: Sequence[float], seeds: Sequence[int]) -> int | None:
    """The shortest schedule at whose end the mean over the seeds is at the target; None if none of the lengths is."""
    found = None
    for length in lengths:
        shorter = replace(trial, steps=round(trial.steps / length))
        if mean_end([bench.run(replace(shorter, seed=seed)) for seed in seeds]) > target:
            break
        found = shorter.steps
    return found


def main(argv: Sequence[str] | None = None, study: Study = STUDY, rungs: Sequence[tuple[int, int]] = RUNGS) -> None:
    """Runs the study, or goes on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe.jsonl"), help="file of the finished runs")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="those to try")
    parser.add_argument("--most", type=int, help="runs to train now at most")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    bench = Bench(study, arguments.runs, arguments.cache_dir, arguments.most)
    best: dict[str, Trial] = {}
    try:
        for name in dict.fromkeys([BASELINE, *arguments.families]):
            best[name], ends = halve(bench, FAMILIES[name], rungs, study.seeds[0])
            last = sorted(bpb for trial, bpb in ends.items() if trial.steps == rungs[-1][1])
            print(f"{name}: {' '.join(f'{bpb:.4f}' for bpb in last)}", flush=True)
        ends_of: dict[str, list[float]] = {
            name: [bench.run(replace(trial, seed=seed)).final for seed in study.seeds[1:]]
            for name, trial in best.items()
        }
        target, factors = statistics.mean(ends_of[BASELINE]), (1.0, *study.muon_lengths)
        lengths = {name: steps_to(bench, trial, target, factors, study.seeds[1:]) for name, trial in best.items()}
    except OutOfRuns as pause:
        print(f"{len(bench.done)} runs are done; {pause}")
        return
    means = {name: statistics.mean(values) for name, values in ends_of.items()}
    order = sorted(means, key=lambda name: means[name])
    show(
        f"{rungs[-1][1]} steps, seeds {study.seeds[1:]}",
        ("", "mean bits/byte", "each", "steps to the baseline's end"),
        [(n, means[n], " ".join(f"{bpb:.4f}" for bpb in ends_of[n]), lengths[n] or "more") for n in order],
    )
    for name in order:
        print(f"{name}: {best[name].optimizer}")
    if arguments.json is not None:
        write_numbers(arguments.json, {"bits per byte": means, "steps to the baseline's end": lengths})


if __name__ == "__main__":
    main()
