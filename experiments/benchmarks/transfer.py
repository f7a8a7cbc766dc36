"""Whether rates tuned on small models serve a larger one: `python -m experiments.benchmarks.transfer`.

At three small sizes the peak rates of the matrices, the head and the embedding are tuned one after the other: by
factors of two until the best has a worse one on each side; the bottom of the parabola through these three, over the
rate's logarithm, is the rate of that size. Three rules say the last size's rates, and are trained there:

- `fitted`: the line through the small sizes, over the logarithm of the width;
- `constant`: the rates of the last of the small sizes;
- `recommended`: those of `grug_native.recommended`, which was made of what came out here.

Then the rates of matrices and head are tuned there as well, from the best of the three, and the losses are compared. At
last the matrices' rate of the first size is tuned for more steps, and for larger batches. Runs are kept in a file as
those of `experiments.benchmarks.optimizers` are, and none is trained twice.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.benchmarks.measure import show, write_numbers
from experiments.benchmarks.optimizers import MODEL, Bench, OutOfRuns, Study, Trial
from grug_native.metrics import parameter_counts
from grug_native.model import GrugModelConfig
from grug_native.optimizer import MuonConfig
from grug_native.recommended import recommended_optimizer

type Rates = Mapping[str, float]
"""Peak rates, by the kind of parameter."""

KINDS = ("matrix", "head", "embedding")
START: Rates = {"matrix": 0.0175, "head": 0.025, "embedding": 0.09}
"""The best point of `experiments.benchmarks.recipe`, where tuning begins."""
START_WIDE: Rates = {"matrix": 0.01973, "head": 0.03151, "embedding": 0.08757}
"""What came out at width 128, where tuning begins at 256."""


def sized(width: int, layers: int) -> GrugModelConfig:
    """A model of the study, with heads of 32."""
    heads = width // 32
    return replace(
        MODEL,
        hidden_dim=width,
        intermediate_dim=11 * width // 4,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
    )


SMALL, LAST = (sized(64, 2), sized(128, 2), sized(256, 4)), sized(384, 4)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained."""

    small: tuple[GrugModelConfig, ...] = SMALL
    starts: tuple[Rates, ...] = (START, START, START_WIDE)
    last: GrugModelConfig = LAST
    steps: int = 300
    seeds: tuple[tuple[int, ...], ...] = ((0, 1), (0, 1), (0,), (0,))
    """Of each size; the mean over them counts."""
    factor: int = 4
    """By which the steps, and then the batch, are multiplied at the end."""


SIZES = Sizes()


def muon(rates: Rates) -> MuonConfig:
    """The recommended optimizer with these rates."""
    usual = recommended_optimizer(MODEL.hidden_dim)
    return replace(
        usual,
        learning_rate=rates["matrix"],
        head=replace(usual.head, learning_rate=rates["head"]),
        embedding=replace(usual.embedding, learning_rate=rates["embedding"]),
    )


def recommended(width: int) -> Rates:
    """The library's rates."""
    chosen = recommended_optimizer(width)
    head, embedding = chosen.head.learning_rate, chosen.embedding.learning_rate
    assert head is not None and embedding is not None
    return {"matrix": chosen.learning_rate, "head": head, "embedding": embedding}


def tune(end: Callable[[Rates], float], start: Rates, kinds: Sequence[str] = KINDS) -> tuple[Rates, float]:
    """Tunes one rate after the other.

    Args:
        end: the loss at the end of a run with some rates.
        start: where to begin.
        kinds: whose rates are tuned.

    Returns:
        For each kind the bottom of its parabola, and the lowest loss that was seen.
    """
    best, bottoms = dict(start), dict[str, float]()
    for kind in kinds:
        ends = {factor: end({**best, kind: best[kind] * 2.0**factor}) for factor in (-1, 0, 1)}
        while (lowest := min(ends, key=lambda factor: ends[factor])) in (min(ends), max(ends)):
            further = lowest - 1 if lowest == min(ends) else lowest + 1
            ends[further] = end({**best, kind: best[kind] * 2.0**further})
        below, at, above = (ends[lowest + side] for side in (-1, 0, 1))
        offset = 0.5 * (below - above) / (below - 2 * at + above)
        bottoms[kind] = best[kind] * 2.0 ** (lowest + offset)
        best[kind] *= 2.0**lowest
    return bottoms, end(best)


def fitted(tuned: Mapping[int, Rates], width: int) -> Rates:
    """Rates on the line through those of other widths, both as logarithms."""
    where = np.log(list(tuned))
    lines = {kind: np.polyfit(where, np.log([rates[kind] for rates in tuned.values()]), 1) for kind in KINDS}
    return {kind: float(np.exp(np.polyval(line, math.log(width)))) for kind, line in lines.items()}


def main(argv: Sequence[str] | None = None, sizes: Sizes = SIZES) -> None:
    """Runs the study, or goes on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer.jsonl"), help="file of the finished runs")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--most", type=int, help="runs to train at each size now at most")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)

    def ends_at(place: int, longer: int = 1, larger: int = 1) -> Callable[[Rates], float]:
        model = (*sizes.small, sizes.last)[place]
        study = Study(model=model, steps=longer * sizes.steps, seeds=sizes.seeds[place])
        study = replace(study, batch_size=larger * study.batch_size)
        bench = Bench(study, arguments.runs, arguments.cache_dir, arguments.most)

        def end(rates: Rates) -> float:
            return statistics.mean(bench.run(Trial(muon(rates), study.steps, seed)).final for seed in study.seeds)

        return end

    first, width = sizes.small[0], sizes.last.hidden_dim
    tuned: dict[int, Rates] = {}
    lowest: dict[int, float] = {}
    try:
        for place, (model, start) in enumerate(zip(sizes.small, sizes.starts, strict=True)):
            tuned[model.hidden_dim], lowest[model.hidden_dim] = tune(ends_at(place), start)
        last = ends_at(len(sizes.small))
        rules = {
            "fitted": fitted(tuned, width),
            "constant": tuned[sizes.small[-1].hidden_dim],
            "recommended": recommended(width),
        }
        rules = {name: {kind: float(f"{rates[kind]:.3g}") for kind in KINDS} for name, rates in rules.items()}
        ends = {name: last(rates) for name, rates in rules.items()}
        start = rules[min(ends, key=lambda name: ends[name])]
        own, lowest[width] = tune(last, start, ("matrix", "head"))
        tuned[width] = {**start, **own}
        others = {
            f"{sizes.factor} x the {name}": tune(ends_at(0, **factors), tuned[first.hidden_dim], ("matrix",))
            for name, factors in (("steps", {"longer": sizes.factor}), ("batch", {"larger": sizes.factor}))
        }
    except OutOfRuns as pause:
        print(pause)
        return
    show(
        f"tuned, {sizes.steps} steps",
        ("width x layers", "parameters", *KINDS, "bits per byte"),
        [
            (
                f"{model.hidden_dim} x {model.num_layers}",
                parameter_counts(model)["total"],
                *(tuned[model.hidden_dim][kind] for kind in KINDS),
                lowest[model.hidden_dim],
            )
            for model in (*sizes.small, sizes.last)
        ],
    )
    show(
        f"width {width} by rule",
        ("", *KINDS, "bits per byte", "over its own best"),
        [
            (name, *(rates[kind] for kind in KINDS), ends[name], f"{ends[name] / lowest[width] - 1:+.2%}")
            for name, rates in rules.items()
        ],
    )
    show(
        f"width {first.hidden_dim}, matrices",
        ("", "rate", "bits per byte"),
        [
            ("as above", tuned[first.hidden_dim]["matrix"], lowest[first.hidden_dim]),
            *((name, rates["matrix"], end) for name, (rates, end) in others.items()),
        ],
    )
    if arguments.json is not None:
        numbers = {str(width): rates for width, rates in tuned.items()}
        write_numbers(arguments.json, {"tuned": numbers, "rules": rules, "bits per byte": ends})


if __name__ == "__main__":
    main()
