"""Muon against AdamW, both tuned, on text that is held out: `python -m experiments.benchmarks.optimizers`.

Each optimizer gets the same budget of trials at the same number of tokens: a sweep of the learning rate, which goes on
until the best rate lies inside it; one pass over its other numbers, in which a change stays if it helps; and AdamW's
rate (with Muon, of what it leaves to AdamW) once more, up or down. The best settings are trained with three seeds. What
AdamW reaches at the end of its schedule is the target, and Muon is trained again with shorter schedules, to find the
shortest at whose end its mean over the seeds reaches that target.

Every run is appended to a file when it is done and is not trained again, so a study that was killed goes on where it
was. `--most N` trains at most N of them; `--cost` measures a step of each, side by side, on a machine that should be
quiet then. Prints the trials and the ratios; `--json` and `--plot` keep them.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from experiments.benchmarks.measure import Spread, interleave, seconds_of, show, spread, write_numbers
from experiments.variants.recipe import RecipeConfig
from grug_native import AdamWConfig, GrugModelConfig, GrugNativeRunConfig, GrugRunner, GrugTrainerConfig
from grug_native.data.corpus import embedded_corpus
from grug_native.language_model import ModelConfig
from grug_native.optimizer import MuonConfig
from grug_native.schedule import ScheduleConfig
from grug_native.tracking.plot import write_picture

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig
    from levanter.data.text.examples import GrugLmExample
    from matplotlib.figure import Figure

    from grug_native.evaluation.perplexity import TaggedEval

WEIGHTS = {"python/code": 0.5, "python/docstrings": 0.25, "english/reference": 0.25}
"""Of the domains; the same from beginning to end, so that a shorter run sees the same mixture."""


RATIO = "AdamW's steps / Muon's (bar: 1.2)"
"""Name of the number that the study is about."""


MODEL = GrugModelConfig(
    vocab_size=1024,
    hidden_dim=128,
    intermediate_dim=352,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    max_seq_len=128,
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all runs have in common."""

    model: ModelConfig = MODEL
    batch_size: int = 16
    """Sequences a step."""
    steps: int = 300
    """Of the sweeps, and of AdamW."""
    evaluations: int = 6
    """Points of a curve, the last one at the end of the run."""
    eval_batch_size: int = 32
    """Sequences of an evaluation batch."""
    eval_batches: int | None = 6
    """Batches of each validation set at most."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the parameters and of the data's order; the sweeps take the first."""
    muon_lengths: tuple[float, ...] = (1.1, 1.2, 1.4, 1.6, 1.8, 2.0)
    """How many times fewer steps than AdamW's Muon may be tried with, ascending."""
    rates: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "muon": (25e-4, 5e-3, 1e-2, 2e-2)}
    )
    """Learning rates of the sweeps, ascending by factors of two; where the best is at an end, the next one is added."""
    others: Mapping[str, Mapping[str, tuple[float, ...]]] = field(
        default_factory=lambda: {
            "adamw": {"weight_decay": (0.0, 0.3), "beta2": (0.98,), "min_lr_ratio": (0.0,), "warmup": (0.2,)},
            "muon": {"momentum": (0.9,), "min_lr_ratio": (0.0,), "warmup": (0.2,)},
        }
    )
    """What is tried of the other numbers, one after the other. With Muon, before them, half and twice AdamW's best rate
    for the parameters that it leaves to AdamW, so that both have as many trials."""


@dataclass(frozen=True)
class Trial:
    """What sets a run apart."""

    optimizer: AdamWConfig | MuonConfig | RecipeConfig
    steps: int
    """Updates, to the end of its schedule."""
    seed: int
    """Of the parameters and of the data's order."""

    @property
    def name(self) -> str:
        """Of the optimizer."""
        return _name_of(self.optimizer)


def _name_of(optimizer: AdamWConfig | MuonConfig | RecipeConfig) -> str:
    return type(optimizer).__name__.removesuffix("Config").lower()


def changed[Config: AdamWConfig | MuonConfig](optimizer: Config, name: str, value: float) -> Config:
    """The optimizer with another number, or one of its schedule."""
    change: dict[str, Any] = {name: value}
    if name in {item.name for item in fields(ScheduleConfig)}:
        change = {"schedule": replace(optimizer.schedule, **change)}
    return replace(optimizer, **change)


@dataclass(frozen=True)
class Outcome:
    """How a run went."""

    curve: tuple[tuple[int, float], ...]
    """Steps, and held-out bits per byte after them (`eval/bpb_exact`); infinite where the run diverged."""
    seconds: float
    """Of its training steps, compiling and evaluating left out. What else the machine did shows in it."""

    @property
    def final(self) -> float:
        """Bits per byte at the end of the schedule."""
        return self.curve[-1][1]

    def steps_to(self, target: float) -> float:
        """Steps at which the curve crosses `target` for the first time; infinite if it never does."""
        before: tuple[int, float] | None = None
        for step, bpb in self.curve:
            if bpb <= target:
                if before is None:
                    return step
                return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - bpb)
            before = step, bpb
        return math.inf


class OutOfRuns(RuntimeError):
    """As many runs as were allowed are done, and the study is not."""


@final
class Bench:
    """Trains trials in this process, and remembers them in a file of JSON lines."""

    def __init__(self, study: Study, file: Path, cache_dir: Path, most: int | None = None):
        """Reads what the file has of this study.

        Args:
            study: what the runs have in common.
            file: where they are kept; made if need be.
            cache_dir: of the corpus.
            most: runs to train at most.
        """
        self._study = study
        self._file = file
        self._cache_dir = cache_dir
        self._left = math.inf if most is None else most
        self._batches: dict[tuple[int, int], GrugLmExample] = {}
        self.done: dict[str, Outcome] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                row = json.loads(line)
                outcome = Outcome(tuple((step, bpb) for step, bpb in row["curve"]), row["seconds"])
                self.done[_name(row["study"], row["trial"])] = outcome

    @cached_property
    def data(self) -> "LmDataConfig":
        """The corpus."""
        return embedded_corpus(self._cache_dir, vocab_size=self._study.model.vocab_size, weights=WEIGHTS)

    @cached_property
    def _evaluation(self) -> "TaggedEval":
        """One for all runs, so that it compiles once."""
        from grug_native.evaluation.perplexity import build_eval_sets, build_tagged_evaluator

        study, model = self._study, self._study.model
        return build_tagged_evaluator(
            build_eval_sets(self.data, model.max_seq_len, model.vocab_size),
            batch_size=study.eval_batch_size,
            mesh=self.runner(Trial(AdamWConfig(), study.steps, 0)).mesh,
            vocab_size=model.vocab_size,
            tokenizer=self.data.the_tokenizer,
            max_batches=study.eval_batches,
        )

    def runner(self, trial: Trial) -> GrugRunner:
        """The runner of a trial; nothing is written to its folder."""
        return GrugRunner(
            GrugNativeRunConfig(
                model=self._study.model,
                data=self.data,
                optimizer=trial.optimizer,
                trainer=GrugTrainerConfig(
                    num_train_steps=trial.steps, train_batch_size=self._study.batch_size, seed=trial.seed
                ),
                output_path=str(Path(tempfile.gettempdir()) / "grug-optimizers"),
            )
        )

    def run(self, trial: Trial) -> Outcome:
        """Trains a trial, or finds it in the file.

        Raises:
            OutOfRuns: if it is not there, and no more may be trained.
        """
        name = _name(_common(self._study), _own(trial))
        if name not in self.done:
            if self._left <= 0:
                raise OutOfRuns("go on with the same command")
            self._left -= 1
            self.done[name] = outcome = self._train(trial)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(run_row(self._study, trial, outcome) + "\n")
            print(f"{_label(trial)}: {outcome.final:.4f} bpb, {outcome.seconds:.0f} s", flush=True)
        return self.done[name]

    def _batch(self, runner: GrugRunner, seed: int, step: int) -> "GrugLmExample":
        """Every run with a seed sees the same batches, so they are read once."""
        if (seed, step) not in self._batches:
            self._batches[seed, step] = runner.batch(step)
        return self._batches[seed, step]

    def _train(self, trial: Trial) -> Outcome:
        runner = self.runner(trial)
        state = runner.init_state()
        number = min(self._study.evaluations, trial.steps)
        due = {round(trial.steps * (point + 1) / number) for point in range(number)}
        curve: list[tuple[int, float]] = []
        seconds, started = 0.0, time.perf_counter()
        for step in range(trial.steps):
            state, metrics = runner.train_step(state, self._batch(runner, trial.seed, step))
            if step == 0:
                metrics.loss.block_until_ready()
                started = time.perf_counter()  # without what compiling took
            if step + 1 in due:
                metrics.loss.block_until_ready()
                seconds += time.perf_counter() - started
                bpb = self._evaluation.evaluate(state.params)["eval/bpb_exact"]
                curve.append((step + 1, math.inf if math.isnan(bpb) else bpb))
                started = time.perf_counter()
        return Outcome(tuple(curve), seconds)


def run_row(study: Study, trial: Trial, outcome: Outcome) -> str:
    """A line of the file of finished runs."""
    return json.dumps({"study": _common(study), "trial": _own(trial)} | asdict(outcome))


def tune(
    bench: Bench, study: Study, start: AdamWConfig | MuonConfig, others: Mapping[str, Sequence[float]]
) -> tuple[Trial, dict[Trial, float]]:
    """Finds an optimizer's best settings.

    Args:
        bench: where trials are run.
        study: how long, and at what rates.
        start: which optimizer, and its settings before anything is tuned.
        others: what is tried of its other numbers once its rate is found.

    Returns:
        The best trial, and of all of them the bits per byte at the end.
    """
    ends: dict[Trial, float] = {}

    def end(optimizer: AdamWConfig | MuonConfig) -> float:
        trial = Trial(optimizer, study.steps, study.seeds[0])
        ends[trial] = bench.run(trial).final
        return ends[trial]

    rates = {rate: end(replace(start, learning_rate=rate)) for rate in study.rates[_name_of(start)]}
    while (best := min(rates, key=lambda rate: rates[rate])) in (min(rates), max(rates)):
        rate = best / 2 if best == min(rates) else 2 * best
        rates[rate] = end(replace(start, learning_rate=rate))
    chosen = replace(start, learning_rate=best)
    for name, values in others.items():
        for value in values:
            if end(changed(chosen, name, value)) < end(chosen):
                chosen = changed(chosen, name, value)
    # With other numbers, another rate may be best; what AdamW updates depends on it most.
    chosen = climb(chosen, "learning_rate" if isinstance(start, AdamWConfig) else "adam_learning_rate", end)
    return Trial(chosen, study.steps, study.seeds[0]), ends


def climb[Config: AdamWConfig | MuonConfig](start: Config, name: str, end: Callable[[Config], float]) -> Config:
    """Doubles a rate for as long as that helps; if it never does, halves it likewise."""
    for factor in (2.0, 0.5):
        best, tried = start, start
        while tried is best:
            tried = changed(best, name, factor * getattr(best, name))
            if end(tried) < end(best):
                best = tried
        if best is not start:
            return best
    return start


@dataclass(frozen=True)
class Comparison:
    """Of the best settings, what the seeds came to."""

    steps: int
    """AdamW's, and Muon's longest."""
    adamw: tuple[Outcome, ...]
    muon: Mapping[int, tuple[Outcome, ...]]
    """By the steps of its schedule."""

    @property
    def target(self) -> float:
        """AdamW's bits per byte at the end, the mean over the seeds."""
        return mean_end(self.adamw)

    @property
    def muon_steps(self) -> float:
        """Muon's shortest schedule that ends at the target or below; infinite if none does."""
        return min((steps for steps, runs in self.muon.items() if mean_end(runs) <= self.target), default=math.inf)

    @property
    def crossing_ratio(self) -> float:
        """AdamW's steps over those at which Muon's longest curves cross the target; 0 where one never does."""
        return self.steps / statistics.mean(run.steps_to(self.target) for run in self.muon[self.steps])

    @property
    def numbers(self) -> dict[str, float]:
        """The ratios."""
        return {
            "target, AdamW's end [bits/byte]": self.target,
            "Muon's end at equal tokens [bits/byte]": mean_end(self.muon[self.steps]),
            "steps to the target, AdamW": self.steps,
            "steps to the target, Muon, schedule ending there": self.muon_steps,
            RATIO: self.steps / self.muon_steps,
            "AdamW's steps / Muon's along its longest curves": self.crossing_ratio,
        }


def mean_end(runs: Sequence[Outcome]) -> float:
    """Bits per byte at the end, the mean over runs."""
    return statistics.mean(run.final for run in runs)


def compare(bench: Bench, study: Study, adamw: Trial, muon: Trial) -> Comparison:
    """Trains the best settings with all seeds, and finds the shortest schedule of Muon's that ends at the target."""

    def all_seeds(trial: Trial) -> tuple[Outcome, ...]:
        return tuple(bench.run(replace(trial, seed=seed)) for seed in study.seeds)

    comparison = Comparison(study.steps, all_seeds(adamw), {study.steps: all_seeds(muon)})

    def reaches(length: float) -> bool:
        nonlocal comparison
        steps = round(study.steps / length)
        comparison = replace(comparison, muon={**comparison.muon, steps: all_seeds(replace(muon, steps=steps))})
        return mean_end(comparison.muon[steps]) <= comparison.target

    # A schedule which ends there should do no worse than the longest one on its way: begin where that one crosses.
    below = [length for length in study.muon_lengths if length <= comparison.crossing_ratio]
    above = [length for length in study.muon_lengths if length > comparison.crossing_ratio]
    reached = not below
    for length in reversed(below):
        if reached := reaches(length):
            break
    for length in above if reached else ():
        if not reaches(length):
            break
    return comparison


def measure_cost(bench: Bench, trials: Iterable[Trial], *, rounds: int, steps: int = 5) -> dict[str, list[float]]:
    """Milliseconds of a step of each optimizer: windows of a few steps, in turn, a value a round."""

    def contender(trial: Trial) -> Callable[[], float]:
        runner = bench.runner(trial)
        state, batch = runner.init_state(), runner.batch(0)

        def train() -> object:
            nonlocal state
            metrics: object = None
            for _ in range(steps):
                state, metrics = runner.train_step(state, batch)
            return metrics

        return lambda: 1e3 * seconds_of(train) / steps

    contenders = {trial.name: contender(trial) for trial in trials}
    interleave(contenders, 1)  # compiles
    return interleave(contenders, rounds)


def draw(comparison: Comparison, sweeps: Mapping[str, Mapping[float, float]]) -> "Figure":
    """The sweeps of the learning rate, the curves at equal tokens, and the ends of schedules of each length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=80)
    left, middle, right = figure.subplots(1, 3)
    colours: dict[str, str] = {"adamw": "#4269d0", "muon": "#ff725c"}
    ends: dict[str, Mapping[int, Sequence[Outcome]]] = {
        "adamw": {comparison.steps: comparison.adamw},
        "muon": comparison.muon,
    }
    for kind, colour in colours.items():
        rates = sorted(rate for rate, bpb in sweeps[kind].items() if math.isfinite(bpb))
        left.plot(rates, [sweeps[kind][rate] for rate in rates], ".-", color=colour, label=kind)
        for number, run in enumerate(ends[kind][comparison.steps]):
            steps, values = zip(*run.curve, strict=True)
            middle.plot(steps, values, color=colour, linewidth=1, label="" if number else kind)
        for steps, runs in ends[kind].items():
            right.plot([steps] * len(runs), [run.final for run in runs], ".", color=colour)
    left.set_xscale("log")
    left.set_ylabel("held-out bits per byte")
    titles = ("after all steps, one seed", "at equal tokens", "at the end of a schedule of so many steps")
    for axes, title, unit in zip((left, middle, right), titles, ("peak learning rate", "step", "steps"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(comparison.target, color="gray", linewidth=0.8, linestyle="--")
    middle.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None, study: Study = Study()) -> None:
    """Runs the study, or goes on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers.jsonl"), help="file of the finished runs")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--most", type=int, help="runs to train now at most")
    parser.add_argument("--cost", type=int, metavar="ROUNDS", help="measure a step of each optimizer too")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    arguments = parser.parse_args(argv)
    bench = Bench(study, arguments.runs, arguments.cache_dir, arguments.most)
    start = AdamWConfig(schedule=ScheduleConfig(warmup=0.1))
    try:
        adamw, adamw_trials = tune(bench, study, start, study.others["adamw"])
        rate = adamw.optimizer.learning_rate
        muon_start = MuonConfig(schedule=start.schedule, adam_learning_rate=rate)
        muon, muon_trials = tune(
            bench, study, muon_start, {"adam_learning_rate": (rate / 2, 2 * rate), **study.others["muon"]}
        )
        comparison = compare(bench, study, adamw, muon)
    except OutOfRuns as pause:
        print(f"{len(bench.done)} runs are done; {pause}")
        return
    trials = adamw_trials | muon_trials
    show("one seed", ("trial", "bits/byte"), [(_label(trial), bpb) for trial, bpb in trials.items()])
    rows = [("adamw", comparison.steps, comparison.adamw)]
    rows += [("muon", steps, runs) for steps, runs in comparison.muon.items()]
    show(
        f"seeds {study.seeds}",
        ("", "steps", "mean bits/byte", "each"),
        [(name, steps, mean_end(runs), " ".join(f"{run.final:.4f}" for run in runs)) for name, steps, runs in rows],
    )
    numbers: dict[str, float | Spread] = dict(comparison.numbers)
    if arguments.cost:
        cost = measure_cost(bench, (adamw, muon), rounds=arguments.cost)
        ratio = spread([muon / adamw for adamw, muon in zip(cost["adamw"], cost["muon"], strict=True)])
        numbers |= {f"step of {kind} [ms]": spread(values) for kind, values in cost.items()}
        numbers["step of Muon / step of AdamW"] = ratio
        numbers["AdamW's time / Muon's to the target"] = comparison.numbers[RATIO] / ratio.median
    show("Muon against AdamW", ("", "value"), list(numbers.items()))
    if arguments.json is not None:
        found = {
            "study": _common(study),
            "chosen": {trial.name: _own(trial) for trial in (adamw, muon)},
            "trials": [{"trial": _own(trial), "bits per byte": bpb} for trial, bpb in trials.items()],
            "curves": asdict(comparison),
        }
        write_numbers(arguments.json, {"numbers": numbers} | found)
    if arguments.plot is not None:
        sweeps: dict[str, Mapping[float, float]] = {
            "adamw": _sweep(start, trials),
            "muon": _sweep(muon_start, trials),
        }
        write_picture(draw(comparison, sweeps), arguments.plot)


def _sweep(start: AdamWConfig | MuonConfig, ends: Mapping[Trial, float]) -> dict[float, float]:
    """Learning rates and ends of the trials that differ from `start` in nothing else."""
    rates = {trial.optimizer.learning_rate: end for trial, end in ends.items() if _only_rate(trial.optimizer, start)}
    return dict(sorted(rates.items()))


def _only_rate(one: AdamWConfig | MuonConfig | RecipeConfig, other: AdamWConfig | MuonConfig) -> bool:
    return replace(one, learning_rate=other.learning_rate) == other


def _common(study: Study) -> dict[str, Any]:
    """What decides the result of a trial besides the trial."""
    names = ("model", "batch_size", "evaluations", "eval_batch_size", "eval_batches")
    return {name: asdict(study)[name] for name in names} | {"weights": WEIGHTS}


def _own(trial: Trial) -> dict[str, Any]:
    return asdict(trial) | {"optimizer": {"type": trial.name} | asdict(trial.optimizer)}


def _name(study: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    return json.dumps([study, trial], sort_keys=True)


def _label(trial: Trial) -> str:
    """The settings that are not the default ones."""
    own, default = asdict(trial.optimizer), asdict(type(trial.optimizer)())
    numbers, usual = own | own.pop("schedule"), default | default.pop("schedule")
    settings = ", ".join(f"{name}={value}" for name, value in numbers.items() if value != usual[name])
    return f"{trial.name} {settings}; {trial.steps} steps, seed {trial.seed}"


if __name__ == "__main__":
    main()
