import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import grug_native
from grug_native.checkpoint.metadata import CheckpointMismatchError
from grug_native.config import load_config
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.runner import GrugRunner, run_grug_native
from grug_native.sharding import MeshAxes
from grug_native.tracking.jsonl import MetricRow, read_metrics
from tests.fixtures_run import MakeRun

NO_EVAL = GrugEvalConfig(max_eval_batches=1)


def rows(folder: Path) -> list[MetricRow]:
    return read_metrics(folder / "metrics.jsonl")


def record(folder: Path) -> list[tuple[object, ...]]:
    """What must be equal, byte for byte, however often a run was interrupted."""
    keys = ("step", "train/loss", "optim/learning_rate", "data/batch_digest", "mixture/stage", "eval/loss")
    return [tuple(row.get(key) for key in keys) for row in rows(folder)]


def test_fit_trains_logs_and_saves(make_run: MakeRun) -> None:
    config = make_run(eval=NO_EVAL, trainer={"ema_beta": 0.9})
    runner = GrugRunner(config)
    state = runner.fit()
    logged = rows(runner.run_folder)
    assert int(state.step) == 8
    assert [row["step"] for row in logged] == list(range(9))
    assert float(logged[7]["train/loss"]) < float(logged[0]["train/loss"])
    assert {"eval/loss", "eval/macro_loss", "eval/bpb_exact", "eval/caves/loss", "eval/ema/loss"} <= logged[0].keys()
    assert logged[8].keys() & {"eval/loss", "train/loss"} == {"eval/loss"}
    names = {"train/loss", "optim/learning_rate", "grad/norm/total", "throughput/tokens_per_second", "mixture/stage"}
    assert names | {"throughput/duration", "throughput/loading_time", "mixture/weight/caves"} <= logged[3].keys()
    assert load_config(runner.run_folder / "config.yaml") == config
    assert [path.name for path in (runner.run_folder / "checkpoints").iterdir()] == ["step-8"]


def test_a_finished_run_trains_no_more(make_run: MakeRun) -> None:
    config = make_run(eval=NO_EVAL)
    first = GrugRunner(config).fit()
    before = record(Path(config.output_path))
    again = GrugRunner(config).fit()
    assert eqx.tree_equal(again.params, first.params)
    assert record(Path(config.output_path)) == before


def test_a_run_that_is_further_than_asked_trains_no_more(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run(eval=NO_EVAL))
    assert int(runner.fit(stop_after=3).step) == 3
    assert int(runner.fit(stop_after=2).step) == 3
    assert [row["step"] for row in rows(runner.run_folder)] == [0, 1, 2]
    with pytest.raises(ValueError, match="stop_after=-1 must not be negative"):
        runner.fit(stop_after=-1)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(make_run: MakeRun) -> None:
    # Across a stage of the mixture, one of the batch size, edges of an epoch, and two resumes.
    stages = [(0, {"caves": 1.0, "clubs": 0.0}), (4, {"caves": 0.5, "clubs": 0.5})]
    whole = make_run(
        trainer={"train_batch_size": ((0, 4), (4, 128))}, eval=GrugEvalConfig(steps_per_eval=2), name="whole"
    )
    whole = replace(whole, data=replace(whole.data, train_weights=stages))
    reference = GrugRunner(whole).fit()
    cut = replace(whole, output_path=whole.output_path.replace("whole", "cut"))
    for stop in (3, 6):
        assert int(GrugRunner(cut).fit(stop_after=stop).step) == stop
    resumed = GrugRunner(cut).fit()
    assert record(Path(cut.output_path)) == record(Path(whole.output_path))
    for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(reference.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {row["mixture/stage"] for row in rows(Path(cut.output_path)) if "train/loss" in row} == {0.0, 1.0}


def test_ctrl_c_ends_the_preparation_of_the_data_at_once(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenize_for_hours(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(3600)

    monkeypatch.setattr("grug_native.data.cache.data_fingerprint", tokenize_for_hours)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore the signal.
    try:
        with pytest.raises(KeyboardInterrupt):
            GrugRunner(make_run()).fit()
    finally:
        signal.signal(signal.SIGINT, before)


def test_stepping_by_hand_is_what_fit_does(make_run: MakeRun) -> None:
    config = make_run(eval=NO_EVAL, trainer={"num_train_steps": 3})
    runner = GrugRunner(config)
    state, losses = runner.init_state(), []
    for step in range(3):
        state, metrics = runner.train_step(state, runner.batch(step))
        losses.append(float(metrics.loss))
    fitted = run_grug_native(config)
    assert losses == [row["train/loss"] for row in rows(Path(config.output_path)) if "train/loss" in row]
    assert eqx.tree_equal(fitted.params, state.params)


def test_changing_the_mathematics_of_a_run_is_refused(make_run: MakeRun) -> None:
    GrugRunner(make_run(eval=NO_EVAL)).fit(stop_after=1)
    with pytest.raises(CheckpointMismatchError, match=r"optimizer.learning_rate.*0\.01.*0\.5"):
        GrugRunner(make_run(eval=NO_EVAL, optimizer={"learning_rate": 0.5})).fit()
    other_mesh = make_run(eval=NO_EVAL, trainer={"mesh": MeshAxes(data=2, model=2), "log_every": 2})
    assert int(GrugRunner(other_mesh).fit(stop_after=2).step) == 2


def test_a_schedule_that_does_not_fit_is_refused_at_once(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match=r"optimizer.schedule.warmup=9 .*num_train_steps=8"):
        GrugRunner(make_run(optimizer={"warmup": 9}))


def test_log_every_thins_the_log_out(make_run: MakeRun) -> None:
    config = make_run(eval=NO_EVAL, trainer={"log_every": 3})
    GrugRunner(config).fit()
    assert [row["step"] for row in rows(Path(config.output_path)) if "train/loss" in row] == [0, 3, 6, 7]


def test_importing_the_package_stays_cheap() -> None:
    heavy = ["levanter", "haliax", "marin", "lm_eval", "wandb", "orbax", "tokenizers", "pyarrow"]
    code = f"import json, sys, grug_native; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []
    assert {"local_text_data", "embedded_corpus"} <= set(grug_native.__all__) <= set(dir(grug_native))
