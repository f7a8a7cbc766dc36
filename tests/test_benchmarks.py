"""The benchmarks at a toy size, end to end: that they run, and that their numbers fit together. Nothing is timed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from experiments.benchmarks import (
    eval_stall,
    experts,
    generation,
    growth,
    input_pipeline,
    loop_overhead,
    measure,
    microbatches,
    optimizers,
)
from experiments.benchmarks.measure import SHAPES, Spread, interleave, spread
from experiments.benchmarks.optimizers import Bench, Outcome, Study, Trial, run_row, tune
from grug_native.optimizer import AdamWConfig, MuonConfig
from grug_native.schedule import ScheduleConfig
from tests.fixtures_run import SMALL_MODEL

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig


@pytest.fixture(autouse=True)
def toy(small_corpus: "LmDataConfig", monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape of a few thousand parameters, and real token caches of a few kilobytes."""

    def corpus(cache_dir: Path, **_: object) -> "LmDataConfig":
        return small_corpus

    for module in (measure, optimizers):
        monkeypatch.setattr(module, "embedded_corpus", corpus)
    monkeypatch.setitem(SHAPES, "toy", (SMALL_MODEL, 4))


def numbers_of(path: Path) -> dict[str, Any]:
    numbers = json.loads(path.read_text())
    assert numbers.pop("environment")["jax"]
    return numbers


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    results = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert results == {"a": [None] * 3, "b": [None] * 3}


def test_a_spread_is_median_and_percentiles() -> None:
    assert spread([float(number) for number in range(11)]) == Spread(5.0, 1.0, 9.0, 11)


def test_input_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    input_pipeline.main(
        ["--shape", "toy", "--rounds", "1", "--steps", "5", "--batches", "3", "--turns", "2", "--json", str(file)]
    )
    numbers = numbers_of(file)["toy"]
    assert numbers["wait for a batch [ms]"]["count"] == numbers["step [ms]"]["count"] == 3
    assert numbers["loader alone [sequences/s]"]["median"] > 0
    assert numbers["loader / one by one (bar: 4)"]["count"] == 2
    assert 0 <= numbers["all waits / all steps [%]"] < 100
    assert numbers["longest wait [ms]"] >= numbers["wait for a batch [ms]"]["high"]


def test_loop_overhead(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    loop_overhead.main(["--shape", "toy", "--rounds", "2", "--steps", "3", "--json", str(file)])
    numbers = numbers_of(file)["toy"]
    assert numbers["fit() step [ms]"]["count"] == numbers["bare step [ms]"]["count"] == 4
    ratio = numbers["fit() step [ms]"]["median"] / numbers["bare step [ms]"]["median"]
    assert numbers["fit() / bare, medians of all steps (bar: 1.02)"] == pytest.approx(ratio)
    assert numbers["fit() / bare, by round"]["count"] == 2
    assert numbers["a bare step's call [ms]"]["count"] == 4
    assert numbers["the first call, compiling [s]"] < numbers["the first step, all of it [s]"]


def test_eval_stall(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    eval_stall.main(["--shape", "toy", "--rounds", "2", "--steps", "2", "--batches", "2", "--json", str(file)])
    plain, averaged = (numbers_of(file)[name] for name in ("without EMA", "with EMA"))
    assert averaged["tokens evaluated"] == 2 * plain["tokens evaluated"] > 0
    for numbers in (plain, averaged):
        assert numbers["compiled later"] == 0
        assert numbers["evaluation [s]"]["count"] == 2
        assert numbers["evaluation [s]"]["median"] < numbers["first evaluation, compiling [s]"]


def test_growth(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    growth.main(["--rounds", "2", "--json", str(file)], points={"sequence": (16, 32)})
    short, long = numbers_of(file)["rows"]
    assert (short["axis"], short["value"], long["value"]) == ("sequence", 16, 32)
    assert short["time_growth"] == short["flops_growth"] == 1 and long["flops_growth"] > 2
    assert long["ratio"] * long["flops_growth"] == pytest.approx(long["time_growth"])
    assert long["milliseconds"]["count"] == 2


RATES = (5e-3, 1e-2, 2e-2)
TOY_STUDY = Study(
    model=replace(SMALL_MODEL, num_layers=1),
    batch_size=4,
    steps=4,
    evaluations=2,
    eval_batch_size=4,
    eval_batches=1,
    seeds=(0, 1),
    muon_lengths=(2.0,),
    rates={"adamw": RATES, "muon": RATES},
    others={"adamw": {"beta2": (0.98,)}, "muon": {}},
)


def write_tuned(study: Study, file: Path) -> None:
    """What a study leaves that was stopped when it had tuned: with all rates at 1e-2 an end at 8 bits, else higher.

    Muon's shorter runs are there too, so that one run of each optimizer is left to train.
    """
    start = AdamWConfig(schedule=ScheduleConfig(warmup=0.1))
    optimizers = [replace(start, learning_rate=rate, beta2=beta2) for rate in RATES for beta2 in (0.95, 0.98)]
    muon = MuonConfig(schedule=start.schedule)
    tuned = [replace(muon, learning_rate=one, adam_learning_rate=two) for one in RATES for two in RATES]
    rows: list[str] = []
    for optimizer in (*optimizers, *tuned):
        rates = (optimizer.learning_rate, getattr(optimizer, "adam_learning_rate", 1e-2))
        end = 8.0 + sum(abs(math.log2(rate / 1e-2)) for rate in rates) + (optimizer.beta2 - 0.95)
        rows.append(run_row(study, Trial(optimizer, study.steps, 0), Outcome(((2, 9.0), (4, end)), 1.0)))
    best = replace(muon, learning_rate=1e-2, adam_learning_rate=1e-2)
    rows += [run_row(study, Trial(best, 2, seed), Outcome(((1, 9.0), (2, 1.0)), 1.0)) for seed in study.seeds]
    file.write_text("".join(f"{row}\n" for row in rows))


def test_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, file, picture = tmp_path / "runs.jsonl", tmp_path / "numbers.json", tmp_path / "picture.png"
    write_tuned(TOY_STUDY, runs)
    command = ["--runs", str(runs), "--json", str(file), "--plot", str(picture)]
    optimizers.main([*command, "--most", "1"], TOY_STUDY)
    assert "18 runs are done" in capsys.readouterr().out
    assert not file.exists()
    before = runs.read_text()
    optimizers.main([*command, "--cost", "1"], TOY_STUDY)
    assert runs.read_text().startswith(before)
    # A run that is there is not trained again.
    trials = [json.dumps(json.loads(line)["trial"]) for line in runs.read_text().splitlines()]
    assert len(set(trials)) == len(trials) == 19
    found = numbers_of(file)
    assert {chosen["optimizer"]["learning_rate"] for chosen in found["chosen"].values()} == {1e-2}
    adamw, muon = found["curves"]["adamw"], found["curves"]["muon"]
    ends = [run["curve"][-1][1] for run in adamw]
    assert ends[0] == 8.0 and 1 < ends[1] < 9
    assert found["numbers"]["target, AdamW's end [bits/byte]"] == sum(ends) / 2
    assert [step for step, _ in muon["4"][1]["curve"]] == [2, 4]
    assert found["numbers"][optimizers.RATIO] == 2
    assert found["numbers"]["step of Muon / step of AdamW"]["count"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_experts_have_no_more_active_operations() -> None:
    dense, mixture = (experts.active_flops(model) for model in experts.MODELS.values())
    assert 0.99 * dense < mixture <= dense


def test_experts_are_compared_with_the_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--runs", str(tmp_path / "runs.jsonl"), "--json", str(tmp_path / "numbers.json")]
    start = AdamWConfig(schedule=ScheduleConfig(warmup=0.1), learning_rate=1e-2)
    rows: list[str] = []
    for number, model in enumerate(experts.MODELS.values()):
        study = replace(TOY_STUDY, model=model)
        trials = [Trial(start, study.steps, seed) for seed in study.seeds]
        rows += [run_row(study, trial, Outcome(((4, 2.0 - number),), 1.0)) for trial in trials]
    (tmp_path / "runs.jsonl").write_text("".join(f"{row}\n" for row in rows))
    experts.main([*command, "--most", "0"], TOY_STUDY, rates=(1e-2,))
    found = numbers_of(tmp_path / "numbers.json")
    assert [found[name]["mean bits/byte"] for name in experts.MODELS] == [2.0, 1.0]


def test_a_sweep_goes_on_until_the_best_rate_lies_inside(tmp_path: Path) -> None:
    start = AdamWConfig()
    # With beta2=0.9 the best rate is 1, and 0.5 with the one that is given.
    ends = {(rate, 0.95): abs(rate - 0.5) + 3 for rate in (0.25, 0.5, 1.0, 2.0, 4.0)}
    ends |= {(rate, 0.9): abs(rate - 1.0) for rate in (0.25, 0.5, 1.0, 2.0)}
    study = Study(steps=10, seeds=(0,), rates={"adamw": (1.0, 2.0, 4.0)})
    trials = {Trial(replace(start, learning_rate=rate, beta2=beta2), 10, 0): end for (rate, beta2), end in ends.items()}
    rows = [run_row(study, trial, Outcome(((10, end),), 1.0)) for trial, end in trials.items()]
    (tmp_path / "runs.jsonl").write_text("".join(f"{row}\n" for row in rows))
    best, tried = tune(Bench(study, tmp_path / "runs.jsonl", tmp_path, 0), study, start, {"beta2": (0.9,)})
    assert (best.optimizer.learning_rate, best.optimizer.beta2) == (1.0, 0.9)
    assert len(tried) == 8


def test_the_crossing_of_a_curve_lies_between_its_points() -> None:
    outcome = Outcome(((10, 3.0), (20, 2.0), (30, 1.5)), 1.0)
    assert outcome.final == 1.5
    assert (outcome.steps_to(2.5), outcome.steps_to(3.5), outcome.steps_to(1.75)) == (15, 10, 25)
    assert math.isinf(outcome.steps_to(1.0))


def test_microbatches(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    microbatches.main(["--shape", "toy", "--passes", "2", "--rounds", "2", "--json", str(file)])
    numbers = numbers_of(file)["toy"]
    assert numbers["2 passes: temporaries [MiB]"] < numbers["one pass: temporaries [MiB]"]
    assert numbers["one pass: step [ms]"]["count"] == numbers["2 passes: step [ms]"]["count"] == 2


def test_generation(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    sizes = ["--requests", "4", "--alone", "2", "--longest", "12", "--new-tokens", "4", "--first-of", "12"]
    generation.main(["--shape", "toy", *sizes, "--rounds", "1", "--json", str(file)])
    numbers = numbers_of(file)
    many = numbers["toy, prompts of 3 to 12, 4 new"]
    together, apart = (many[f"{name} [tokens/s]"]["median"] for name in ("4 at once", "one at a time"))
    assert many["at once / one at a time (bar: 8)"]["median"] == pytest.approx(together / apart)
    assert numbers["toy"]["first token / forward pass, last logits (bar: 1.5)"]["count"] == 4
