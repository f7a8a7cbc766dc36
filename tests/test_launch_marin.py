import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig
from grug_native.host.fault_injection import InjectedFaultError
from grug_native.optimizer import AdamWConfig
from grug_native.schedule import ScheduleConfig
from tests.fixtures_run import SMALL_MODEL

if TYPE_CHECKING:
    from marin.execution.lazy import ArtifactStep, StepContext

    from grug_native.launch.marin import GrugRun

type MakeStep = Callable[..., "ArtifactStep[GrugRun]"]


@pytest.fixture(autouse=True)
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Where steps keep what they make: `./runs`, as when nothing says otherwise."""
    monkeypatch.delenv("MARIN_PREFIX", raising=False)
    monkeypatch.setenv("LOGNAME", "grug")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "grug_native")
    return tmp_path / "runs"


@pytest.fixture
def make_step(text_folder: Path) -> MakeStep:
    """Makes the step of a small run on two domains of text."""
    from fray.types import ResourceConfig

    from grug_native.launch.marin import corpus_data, corpus_step, training_step

    paths = {domain: text_folder / domain for domain in ("caves", "clubs")}

    def make(version: str = "dev", *, seed: int = 0, cpu: float = 1, batch: int = 4) -> "ArtifactStep[GrugRun]":
        corpus = corpus_step("corpora/small", vocab_size=300, paths=paths, version=version)

        def build(ctx: "StepContext") -> GrugNativeRunConfig:
            return GrugNativeRunConfig(
                model=SMALL_MODEL,
                data=replace(corpus_data(ctx, corpus), mixture_block_size=8),
                optimizer=AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=1)),
                trainer=GrugTrainerConfig(num_train_steps=4, train_batch_size=batch, seed=seed, steps_per_checkpoint=2),
                output_path=ctx.output_path,
            )

        return training_step(
            "small/run", build, deps=(corpus,), version=version, resources=ResourceConfig.with_cpu(cpu=cpu)
        )

    return make


def test_a_dev_run_resumes_and_then_serves(
    make_step: MakeStep, prefix: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from grug_native.launch.marin import run_steps

    folder = prefix / "users/grug/small/run/dev"
    monkeypatch.setenv("GRUG_FAULT", "raise@step:3")
    with pytest.raises(InjectedFaultError, match="raise@step:3"):
        run_steps(make_step())
    monkeypatch.delenv("GRUG_FAULT")
    assert f"small-run-dev starts from scratch, for 4 steps, in {folder}" in caplog.text
    assert "Step failed" not in caplog.text

    run = run_steps(make_step())
    assert f"small-run-dev resumes at step 2 of 4, in {folder}" in caplog.text
    assert run.path == str(folder) and (run.run_id, run.steps) == ("small-run-dev", 4)
    assert run.final["train/loss"] < run.first["train/loss"] and run.results().final == run.final

    caplog.clear()
    assert run_steps(make_step()) == run
    assert f"finished before, after 4 steps: {folder}" in caplog.text


def test_a_dated_run_is_made_once_and_served(
    make_step: MakeStep, prefix: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from marin.execution.artifact import read_record

    from grug_native.launch.marin import run_steps

    run = run_steps(make_step("2026.01.29"))
    assert "small/run@2026.01.29 is made once" in caplog.text
    record = read_record(run.path)
    assert record is not None and record.deps == ["corpora/small@2026.01.29"]
    assert record.result_type == "grug_native.launch.marin.GrugRun"

    caplog.clear()
    before = sorted((path, path.stat().st_mtime_ns) for path in (prefix / "small").rglob("*") if path.is_file())
    assert run_steps(make_step("2026.01.29", seed=1)) == run
    assert "small/run@2026.01.29 is served from" in caplog.text and "nothing runs" in caplog.text
    assert "trainer.seed: 0 -> 1" in caplog.text  # the recipe has changed, and marin says so
    assert sorted((path, path.stat().st_mtime_ns) for path in (prefix / "small").rglob("*") if path.is_file()) == before


def test_a_step_is_what_its_recipe_says_and_not_where_or_on_what_it_runs(
    make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marin.execution import fingerprint

    monkeypatch.setattr(fingerprint, "_STRICT_OVERRIDE", True)
    step = make_step()
    assert step.fingerprint() == make_step(cpu=8).fingerprint() != make_step(seed=1).fingerprint()
    payload = step.fingerprint_payload()
    monkeypatch.setenv("MARIN_PREFIX", "/somewhere/else")
    assert make_step().fingerprint_payload() == payload
    assert "/somewhere" not in payload and str(Path.cwd()) not in payload


def test_the_mistake_of_a_run_comes_out_as_it_was_raised(make_step: MakeStep) -> None:
    from grug_native.launch.marin import run_steps

    with pytest.raises(ValueError, match="train_batch_size=6 does not divide over 4"):
        run_steps(make_step(batch=6))
    with pytest.raises(ValueError, match="calendar version"):
        make_step("v1")


def test_a_cluster_that_cannot_be_had_is_told_with_the_way_out(
    make_step: MakeStep, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grug_native.launch.marin import run_steps

    with pytest.raises(ValueError, match="MARIN_PREFIX is not set: a cluster needs a folder that all its machines see"):
        run_steps(make_step(), cluster="http://127.0.0.1:1")
    monkeypatch.setenv("MARIN_PREFIX", str(prefix))
    with pytest.raises(ConnectionError, match=re.escape("cluster='http://127.0.0.1:1': nobody answers there")):
        run_steps(make_step(), cluster="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="give http://HOST:PORT"):
        run_steps(make_step(), cluster="marin")


def test_marins_own_tokenized_datasets_are_steps_before_a_run(
    text_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from fray.types import ResourceConfig
    from marin.experiment.data import mixture, tokenized

    from grug_native.data.corpus import local_text_data
    from grug_native.launch.marin import run_steps, training_step

    # marin refuses training data from a path with "test" in it.
    root = tmp_path_factory.mktemp("marin")
    monkeypatch.setenv("MARIN_PREFIX", str(root))
    documents = root / "documents.jsonl"
    texts = [path.read_text() for path in sorted((text_folder / "caves").iterdir())]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    own = local_text_data({"caves": text_folder / "caves"}, cache_dir=root / "own", vocab_size=300)
    caves = tokenized("tokenized/caves", tokenizer=str(own.tokenizer), paths=[str(documents)], version="dev")

    def build(ctx: "StepContext") -> GrugNativeRunConfig:
        return GrugNativeRunConfig(
            model=SMALL_MODEL,
            data=mixture(ctx, {caves: 1.0}),
            optimizer=AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=1)),
            trainer=GrugTrainerConfig(num_train_steps=2, train_batch_size=4),
            output_path=ctx.output_path,
        )

    step = training_step("marin/run", build, deps=(caves,), resources=ResourceConfig.with_cpu())
    run = run_steps(step)
    assert run.steps == 2 and (root / "tokenized/caves/dev/train").is_dir()
