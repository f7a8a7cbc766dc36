import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from grug_native.components import RunParts
from grug_native.evaluation.config import GrugEvalConfig, GrugHarnessConfig
from grug_native.evaluation.scoring import Request, Scorer
from grug_native.hooks import Evaluations
from grug_native.host.signals import StopRequestedError, StopSignal
from grug_native.loop import EvaluationError
from grug_native.runner import GrugRunner
from grug_native.tracking.jsonl import RunTracker, read_metrics
from tests.fixtures_run import MakeRun


def pairs_task(folder: Path) -> dict[str, object]:
    rows = [{"good": f"grug say {word}", "bad": f"{word} say grug"} for word in ("complexity", "demon", "spirit")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "pairs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def words_task(folder: Path) -> dict[str, object]:
    drawn = {"output_type": "generate_until", "doc_to_text": "{{bad}}", "doc_to_target": "{{good}}"}
    drawn |= {"task": "words", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    scored = {name: value for name, value in pairs_task(folder).items() if name != "doc_to_choice"}
    return scored | drawn | {"metric_list": [metric]}


def test_tasks_and_samples_run_in_the_loop(make_run: MakeRun, tmp_path: Path) -> None:
    harness = GrugHarnessConfig(tasks=(pairs_task(tmp_path), words_task(tmp_path)), steps_per_harness=2)
    config = make_run(
        trainer={"num_train_steps": 3},
        eval=GrugEvalConfig(max_eval_batches=1, harness=harness, sample_prompts=("grug", ""), sample_tokens=4),
    )
    GrugRunner(config).fit()
    folder = Path(config.output_path)
    rows = {int(row["step"]): row for row in read_metrics(folder / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "lm_eval/pairs/acc" in row] == [0, 2, 3]
    assert 0 <= float(rows[3]["lm_eval/pairs/acc"]) <= 1
    assert 0 <= float(rows[3]["lm_eval/words/exact_match"]) <= 1
    reports = {path.name: json.loads(path.read_text()) for path in (folder / "harness").iterdir()}
    assert reports.keys() == {f"step-{step}-pairs+words.json" for step in (0, 2, 3)}
    cut = reports["step-3-pairs+words.json"]["run"]["cut_contexts"]
    assert cut == {"pairs": {"contexts": 6, "cut": 0}, "words": {"contexts": 3, "cut": 0}}
    samples = (folder / "samples.md").read_text()
    assert [line for line in samples.splitlines() if line.startswith("#")] == ["## Step 0", "## Step 3"]
    assert samples.count("```text\ngrug") == 2
    GrugRunner(config).fit()
    assert (folder / "samples.md").read_text() == samples


def test_one_task_is_not_its_letters(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(pairs_task(tmp_path)))
    runner = GrugRunner(make_run())
    metrics = runner.harness(runner.init_state(), str(tmp_path / "pairs.yaml"))
    assert "lm_eval/pairs/acc" in metrics


def test_an_evaluation_that_fails_does_not_lose_the_run(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRUG_FAULT", "raise@eval:2")
    config = make_run(trainer={"num_train_steps": 3}, eval=GrugEvalConfig(steps_per_eval=1, max_eval_batches=1))
    with pytest.raises(EvaluationError, match=r"1 evaluation\(s\) failed"):
        GrugRunner(config).fit()
    assert "the evaluation after 2 steps failed; training goes on" in caplog.text
    rows = read_metrics(Path(config.output_path) / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [0, 1, 2]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 1, 3]
    assert (Path(config.output_path) / "checkpoints" / "step-3").is_dir()


def test_a_failed_evaluation_does_not_hide_that_the_run_was_told_to_stop(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRUG_FAULT", "raise@eval:1,term@step:2")
    config = make_run(trainer={"num_train_steps": 8}, eval=GrugEvalConfig(steps_per_eval=1, max_eval_batches=1))
    with pytest.raises(SystemExit) as ended:
        GrugRunner(config).fit()
    assert ended.value.code == 128 + signal.SIGTERM


def test_samples_of_what_is_done_anew_are_cut_off(make_run: MakeRun) -> None:
    config = make_run(
        trainer={"num_train_steps": 3, "steps_per_checkpoint": 1},
        eval=GrugEvalConfig(max_eval_batches=1, steps_per_eval=1, sample_prompts=("grug",), sample_tokens=4),
    )
    GrugRunner(config).fit()
    samples = Path(config.output_path) / "samples.md"
    whole = samples.read_text()
    assert whole.count("## Step") == 4
    samples.write_text(whole.replace("## Step 2\n\n```text\n", "## Step 2\n\n```text\nof another run: "))
    GrugRunner(config).fit(resume_step=2, stop_after=2)
    assert samples.read_text() == whole[: whole.index("## Step 3")]


def test_tasks_that_cannot_run_stop_the_run_before_its_first_step(make_run: MakeRun, tmp_path: Path) -> None:
    broken = pairs_task(tmp_path) | {"unsafe_code": True}
    config = make_run(eval=GrugEvalConfig(max_eval_batches=1, harness=GrugHarnessConfig(tasks=(broken,))))
    with pytest.raises(ValueError, match="pairs"):
        GrugRunner(config).fit()
    assert not read_metrics(Path(config.output_path) / "metrics.jsonl")


def test_an_evaluation_is_left_off_when_the_run_is_told_to_stop(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_run(eval=GrugEvalConfig(steps_per_eval=1, sample_prompts=("grug",)))
    parts = RunParts(config, GrugRunner(config).optimizer)
    state, evaluate = parts.init_state(), parts.evaluation
    assert evaluate is not None
    evaluations = Evaluations(parts, RunTracker(None, ()))
    scorer = Scorer(params=state.params, mesh=parts.mesh, row_length=32, batch_size=4)
    with StopSignal() as stop, caplog.at_level("INFO"):
        os.kill(os.getpid(), signal.SIGTERM)
        while stop.exit_code is None:
            time.sleep(0.001)
        with pytest.raises(StopRequestedError):
            evaluate(state)
        with pytest.raises(StopRequestedError):
            scorer.score([Request([1], [2])])
        evaluations.run(state, 1)
    assert evaluations.failed == 0
    for what in ("the evaluation", "sampling"):
        assert f"{what} after 1 steps is left to the process that resumes here" in caplog.text
