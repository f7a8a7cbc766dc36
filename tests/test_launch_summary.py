import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from grug_native.config import save_config
from grug_native.host.run_folder import RESULTS_FILE, RunLock, RunLockedError
from grug_native.host.signals import ExitCode
from grug_native.launch.job import main, train_to_results
from grug_native.launch.summary import print_results, read_results, summarize_run
from grug_native.metrics import parameter_counts
from grug_native.runner import GrugRunner
from grug_native.tracking.jsonl import read_metrics
from tests.fixtures_run import SMALL_MODEL, MakeRun


def test_a_finished_run_is_summed_up_and_then_left_alone(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "grug_native")
    config = make_run(trainer={"num_train_steps": 3})
    GrugRunner(config).fit(stop_after=2)
    with pytest.raises(ValueError, match="at step 2 of 3"):
        summarize_run(config)

    results = train_to_results(config)
    folder = Path(config.output_path)
    rows = read_metrics(folder / "metrics.jsonl")
    assert results.steps == 3 and results.tokens == 3 * 4 * 32
    assert results.parameters == parameter_counts(SMALL_MODEL)["total"]
    assert results.first["train/loss"] == rows[0]["train/loss"] and results.first["eval/loss"] == rows[0]["eval/loss"]
    assert results.final["train/loss"] == rows[2]["train/loss"] and results.final["eval/loss"] == rows[3]["eval/loss"]
    assert results.final.keys() == results.first.keys() >= {"eval/caves/loss", "eval/clubs/bpb_exact"}
    assert results.training_seconds == math.fsum(float(row["throughput/duration"]) for row in rows[:3])
    print_results(results, str(folder))
    shown = capsys.readouterr().out
    for words in ("held-out bits per byte", "  caves ", "  clubs ", f"{results.final['eval/loss']:.4f}", "384"):
        assert words in shown
    assert results.hardware["devices"] == 4 and results.versions["jax"]
    assert asdict(read_results(folder)) == asdict(results)

    written = (folder / RESULTS_FILE).stat().st_mtime_ns
    assert asdict(train_to_results(config)) == asdict(results)
    assert (folder / RESULTS_FILE).stat().st_mtime_ns == written
    assert "finished before, after 3 steps" in caplog.text

    GrugRunner(config).fit(resume_step=2, stop_after=2)
    assert not (folder / RESULTS_FILE).exists()
    assert train_to_results(config).final["train/loss"] == results.final["train/loss"]


def test_a_job_says_in_its_exit_code_how_it_ended(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(tmp_path / "run.yaml"), *arguments])
        return ended.value.code, capsys.readouterr().err

    code, words = job()
    assert code == ExitCode.REFUSED and "grug_native.launch.job: there is no file" in words
    config = make_run(trainer={"num_train_steps": 3})
    save_config(config, tmp_path / "run.yaml")
    Path(config.output_path).mkdir()
    lock = RunLock(Path(config.output_path), "run")
    try:
        assert job()[0] == ExitCode.LOCKED
        with pytest.raises(RunLockedError):
            main(["--config", str(tmp_path / "run.yaml"), "--debug"])
    finally:
        lock.release()
    main(["--config", str(tmp_path / "run.yaml")])
    save_config(replace(config, trainer=replace(config.trainer, seed=9)), tmp_path / "run.yaml")
    code, words = job()
    assert code == ExitCode.REFUSED and "trainer.seed: stored 0, wanted 9" in words


def test_a_tokenizer_that_is_not_to_be_had_is_refused_with_the_way_out(make_run: MakeRun) -> None:
    from levanter.data.text.datasets import LmDataConfig

    config = make_run(data=LmDataConfig(tokenizer="nobody/has-this-tokenizer"))
    with pytest.raises(ValueError, match=r"nobody/has-this-tokenizer.*give the folder of a tokenizer\.json"):
        train_to_results(config)
