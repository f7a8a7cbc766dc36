"""Marin's executor with a bucket as its prefix; its own lock on s3:// needs virtual hosts, which the loopback lacks."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig
from grug_native.host.fault_injection import InjectedFaultError
from grug_native.optimizer import AdamWConfig
from grug_native.schedule import ScheduleConfig
from tests.bucket.servers import Bucket
from tests.fixtures_run import SMALL_MODEL

if TYPE_CHECKING:
    from marin.execution.lazy import StepContext


@pytest.mark.slow_faults
def test_a_step_resumes_and_is_then_served(
    gcs: Bucket, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fray.types import ResourceConfig

    from grug_native.launch.marin import corpus_data, corpus_step, run_steps, training_step

    prefix = gcs.new_folder("marin")
    for name, value in (
        gcs.environment() | {"STORAGE_EMULATOR_HOST": gcs.proxy.url, "GOOGLE_CLOUD_PROJECT": "p"}
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MARIN_PREFIX", prefix)
    monkeypatch.setenv("LOGNAME", "grug")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "grug_native")
    corpus = corpus_step("corpora/small", vocab_size=300, paths={"caves": text_folder / "caves"}, version="2026.01.29")

    def build(ctx: "StepContext") -> GrugNativeRunConfig:
        return GrugNativeRunConfig(
            model=SMALL_MODEL,
            data=replace(corpus_data(ctx, corpus), mixture_block_size=8),
            optimizer=AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=1)),
            trainer=GrugTrainerConfig(num_train_steps=4, train_batch_size=4, steps_per_checkpoint=2),
            output_path=ctx.output_path,
        )

    step = training_step(
        "small/run", build, deps=(corpus,), version="2026.01.29", resources=ResourceConfig.with_cpu(cpu=1)
    )
    monkeypatch.setenv("GRUG_FAULT", "raise@step:3")
    with pytest.raises(InjectedFaultError, match="raise@step:3"):
        run_steps(step)
    monkeypatch.delenv("GRUG_FAULT")
    assert f"starts from scratch, for 4 steps, in {prefix}/small/run/" in caplog.text

    run = run_steps(step)
    assert "resumes at step 2 of 4" in caplog.text
    assert run.path.startswith(prefix) and run.steps == 4

    caplog.clear()
    assert run_steps(step) == run
    assert f"is served from {run.path}" in caplog.text
