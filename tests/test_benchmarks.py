"""The benchmarks at a toy size, end to end: that they run, and that their numbers fit together. Nothing is timed."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from experiments.benchmarks import eval_stall, growth, input_pipeline, optimizers
from experiments.benchmarks.measure import SHAPES, Spread, interleave, spread
from experiments.benchmarks.optimizers import Outcome, Study
from tests.fixtures_run import SMALL_MODEL

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig


@pytest.fixture(autouse=True)
def toy(small_corpus: "LmDataConfig", monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape of a few thousand parameters, and real token caches of a few kilobytes."""

    def corpus(cache_dir: Path, **_: object) -> "LmDataConfig":
        return small_corpus

    for module in (eval_stall, input_pipeline, optimizers):
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
    input_pipeline.main(["--shape", "toy", "--rounds", "1", "--steps", "5", "--batches", "3", "--json", str(file)])
    numbers = numbers_of(file)["toy"]
    assert numbers["wait for a batch [ms]"]["count"] == numbers["step [ms]"]["count"] == 3
    assert numbers["loader alone [batches/s]"]["median"] > 0
    assert 0 <= numbers["all waits / all steps [%]"] < 100
    assert numbers["longest wait [ms]"] >= numbers["wait for a batch [ms]"]["high"]


def test_eval_stall(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    eval_stall.main(["--shape", "toy", "--rounds", "2", "--steps", "2", "--batches", "2", "--json", str(file)])
    plain, averaged = (numbers_of(file)[name] for name in ("without EMA", "with EMA"))
    assert averaged["tokens evaluated"] == 2 * plain["tokens evaluated"] > 0
    for numbers in (plain, averaged):
        assert numbers["compiled later"] == 0
        assert numbers["evaluation [s]"]["count"] == 2
        assert numbers["evaluation [s]"]["median"] < numbers["first evaluation, compiling [s]"]


def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "numbers.json"
    growth.main(["--rounds", "2", "--json", str(file)], points={"sequence": (16, 32), "batch": (4, 8)})
    rows = numbers_of(file)["rows"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("sequence", 16),
        ("sequence", 32),
        ("batch", 4),
        ("batch", 8),
    ]
    assert [row["time_growth"] for row in rows if row["value"] in (16, 4)] == [1, 1]
    assert rows[3]["flops_growth"] == 2 < rows[1]["flops_growth"]
    assert all(row["ratio"] * row["flops_growth"] == pytest.approx(row["time_growth"]) for row in rows)


TOY_STUDY = Study(
    model=SMALL_MODEL,
    batch_size=4,
    steps=6,
    evaluations=3,
    eval_batch_size=4,
    eval_batches=1,
    seeds=(0, 1),
    muon_lengths=(1.5,),
    rates={"adamw": (1e-2, 2e-2), "muon": (1e-2, 2e-2)},
    others={"adamw": {"beta2": (0.98,)}, "muon": {}},
)


def test_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, file, picture = tmp_path / "runs.jsonl", tmp_path / "numbers.json", tmp_path / "picture.png"
    command = ["--runs", str(runs), "--json", str(file), "--plot", str(picture)]
    optimizers.main([*command, "--most", "2"], TOY_STUDY)
    assert "2 runs are done" in capsys.readouterr().out
    assert not file.exists()
    before = runs.read_text()
    optimizers.main([*command, "--cost", "1"], TOY_STUDY)
    assert runs.read_text().startswith(before)
    found = numbers_of(file)
    rows = [json.loads(line) for line in runs.read_text().splitlines()]
    # A run that is there is not trained again.
    trials = [json.dumps(row["trial"]) for row in rows]
    assert len(set(trials)) == len(trials)
    for kind in ("adamw", "muon"):
        ends = {
            row["trial"]["optimizer"]["learning_rate"]: row["curve"][-1][1]
            for row in rows
            if row["trial"]["optimizer"]["kind"] == kind and row["trial"]["seed"] == 0 and row["trial"]["steps"] == 6
        }
        assert min(ends, key=lambda rate: ends[rate]) not in (min(ends), max(ends))
    target = found["numbers"]["target, AdamW's end [bits/byte]"]
    assert target == pytest.approx(sum(run["curve"][-1][1] for run in found["curves"]["adamw"]) / 2)
    assert [step for step, _ in found["curves"]["muon"]["4"][0]["curve"]] == [1, 3, 4]
    assert found["numbers"]["step of Muon / step of AdamW"]["count"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_crossing_of_a_curve_lies_between_its_points() -> None:
    outcome = Outcome(((10, 3.0), (20, 2.0), (30, 1.5)), 1.0)
    assert outcome.final == 1.5
    assert (outcome.steps_to(2.5), outcome.steps_to(3.5), outcome.steps_to(1.75)) == (15, 10, 25)
    assert math.isinf(outcome.steps_to(1.0))
