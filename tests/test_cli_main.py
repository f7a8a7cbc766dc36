import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import pytest
import yaml

from grug_native.cli.main import build_parser, main, parse, split_overrides
from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig, config_to_dict, save_config
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.host.run_folder import RunLock
from grug_native.host.signals import ExitCode
from grug_native.optimizer import AdamWConfig, MuonConfig
from grug_native.schedule import ScheduleConfig
from grug_native.tracking.jsonl import read_metrics
from tests.fixtures_data import make_text, write_rolling_task
from tests.fixtures_run import SMALL_MODEL, MakeRun, without_runtime_types

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig

type Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def config_file(small_corpus: "LmDataConfig", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a run that has not begun."""
    folder = tmp_path_factory.mktemp("cli")
    config = GrugNativeRunConfig(
        model=SMALL_MODEL,
        data=small_corpus,
        optimizer=AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=1)),
        trainer=GrugTrainerConfig(num_train_steps=9, train_batch_size=4, ema_beta=0.5, steps_per_checkpoint=2),
        eval=GrugEvalConfig(max_eval_batches=1),
        output_path=str(folder / "run"),
    )
    save_config(config, folder / "run.yaml")
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def trained(config_file: Path) -> Path:
    """The folder of a run that the command line has trained, with steps of its own choice."""
    arguments = ["train", "--config_path", str(config_file), "--trainer.num_train_steps", "4"]
    assert main(arguments) == 0
    return config_file.parent / "run"


def test_train_takes_overrides_and_leaves_everything_behind(trained: Path, capsys: Capture) -> None:
    assert yaml.safe_load((trained / "config.yaml").read_text())["trainer"]["num_train_steps"] == 4
    assert [row["step"] for row in read_metrics(trained / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert (trained / "loss.png").stat().st_size > 10_000
    # Once more, from its own folder: there is nothing left to do, and the same table.
    assert main(["train", "--config_path", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert "run after 4 steps" in printed
    assert "held-out bits per byte" in printed


def test_train_in_pieces(config_file: Path, tmp_path: Path, capsys: Capture) -> None:
    own = ["train", "--config_path", str(config_file), "--output_path", str(tmp_path / "pieces")]
    own.append("--trainer.num_train_steps=4")
    assert main([*own, "--stop_after", "3", "--profile", "1:2"]) == 0
    assert (tmp_path / "pieces" / "profile" / "step-1" / "profile.txt").read_text().startswith("steps 1 to 2")
    assert "is at step 3 of 4" in capsys.readouterr().out
    assert main([*own, "--resume_step", "2", "--stop_after", "3"]) == 0
    assert main(own) == 0
    whole = read_metrics(config_file.parent / "run" / "metrics.jsonl")
    assert [row.get("train/loss") for row in read_metrics(tmp_path / "pieces" / "metrics.jsonl")] == [
        row.get("train/loss") for row in whole
    ]


def test_plan_of_a_file_and_of_a_run(config_file: Path, trained: Path, capsys: Capture) -> None:
    other = ["plan", "--trainer.num_train_steps", "7", str(config_file)]
    assert main(other) == ExitCode.REFUSED
    assert "trainer.num_train_steps: stored 4, wanted 7" in capsys.readouterr().err
    assert main([*other, "--trainer.allow_changes", "[trainer.num_train_steps]"]) == 0
    assert "1.00e-03 at 6" in capsys.readouterr().out
    assert main(["plan", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert "4, goes on from step 4" in printed
    assert "the tokenizer has 300 tokens" in printed


def test_eval_current_and_averaged(trained: Path, capsys: Capture) -> None:
    assert main(["eval", str(trained), "--step", "2"]) == 0
    assert "eval/caves/bpb_exact" in capsys.readouterr().out
    assert main(["eval", str(trained), "--ema"]) == 0
    assert "eval/ema/bpb_exact" in capsys.readouterr().out


def test_harness_writes_a_report(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    task = str(write_rolling_task(tmp_path))
    assert main(["harness", str(trained), "--tasks", task, "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "lm_eval/rolling/bits_per_byte" in printed
    report = json.loads((trained / "harness" / "step-4-rolling.json").read_text())
    assert report["n-samples"]["rolling"]["effective"] == 2
    # What cannot be written is printed, and then the error is said.
    blocked = shutil.copytree(trained, tmp_path / "blocked", ignore=shutil.ignore_patterns("harness"))
    (blocked / "harness").write_text("a file")
    assert main(["harness", str(blocked), "--tasks", task]) == ExitCode.FAILED
    printed = capsys.readouterr()
    assert "lm_eval/rolling/bits_per_byte" in printed.out and '"n-samples": {' in printed.out
    assert "the report cannot be written" in printed.err and str(blocked / "harness") in printed.err
    assert main(["harness", str(trained)]) == ExitCode.REFUSED


def test_sample_and_plot(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    texts: list[str] = []
    for temperature in ("0", "0", "1.5"):
        arguments = ["sample", str(trained), "grug brain", "--max_new_tokens", "8", "--temperature", temperature]
        assert main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert all(text.startswith("grug brain") for text in texts)
    # As much as there is room for, if nobody says how much.
    assert main(["sample", str(trained), "--step", "2"]) == 0
    capsys.readouterr()
    (tmp_path / "prompts.txt").write_bytes("\ufeffsay \r\n\n  \r\ncomplexity".encode())
    several = ["sample", str(trained), "grug brain", "--prompt_file", str(tmp_path / "prompts.txt")]
    assert main([*several, "--max_new_tokens", "8", "--temperature", "0", "--top_p", "0.5"]) == 0
    own, *others = capsys.readouterr().out.split("\n---\n")
    assert f"{own}\n" == texts[0]
    assert [text[: len(start)] for text, start in zip(others, ("say ", "complexity"), strict=True)] == [
        "say ",
        "complexity",
    ]
    for content, words in ((b" \n\n", "has no prompts"), (b"caf\xe9", "cannot be read as UTF-8")):
        (tmp_path / "prompts.txt").write_bytes(content)
        assert main(several) == ExitCode.REFUSED
        assert words in capsys.readouterr().err
    assert main(["plot", str(trained), "--output", str(tmp_path / "none" / "a.png")]) == ExitCode.REFUSED
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert main(["plot", str(trained), str(trained), "--output", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert main(["plot", str(trained), "--output", str(tmp_path / "both")]) == ExitCode.REFUSED
    assert f"give {tmp_path / 'both.png'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "trainer",
    [
        {"mesh": {"replica_dcn": 1, "data": 8, "model": 1}, "train_batch_size": 8},
        {"mesh": {"replica_dcn": 2, "data": 4, "model": 2}, "train_batch_size": 8},
        {"train_batch_size": 1},
        {"train_batch_size": [[0, 2], [2, 6]]},
    ],
)
def test_a_checkpoint_is_used_on_other_devices(
    trained: Path, tmp_path: Path, capsys: Capture, trainer: dict[str, Any]
) -> None:
    def losses() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if "loss" in line or "bpb_exact" in line]

    assert main(["eval", str(trained)]) == 0
    wanted = losses()
    run = shutil.copytree(trained, tmp_path / "run")
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw["trainer"] |= trainer
    raw["eval"] |= {"eval_batch_size": 3}
    raw["model"]["attention"] = "cudnn"
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    assert main(["eval", str(run)]) == 0
    assert losses() == wanted != []
    assert main(["sample", str(run), "grug", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("grug")
    # To train there is another matter.
    assert main(["train", "--config_path", str(run), "--output_path", str(tmp_path / "new")]) == ExitCode.REFUSED


def test_checkpoints_are_listed_shown_verified_and_compared(trained: Path, capsys: Capture) -> None:
    assert main(["ckpt", "ls", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert "step-4" in printed
    assert "step-2" in printed
    assert main(["ckpt", "show", str(trained), "--step", "2"]) == 0
    assert "params.embed" in capsys.readouterr().out
    assert main(["ckpt", "verify", str(trained)]) == 0
    assert capsys.readouterr().out == "step-4: sound\nstep-2: sound\n"
    assert main(["ckpt", "diff", str(trained), "2", "4", "--values"]) == 0
    assert "max |a - b|" in capsys.readouterr().out
    assert main(["ckpt", "diff", str(trained), "2", "4", "--other", str(trained / "checkpoints")]) == 0


def test_a_damaged_checkpoint_fails_the_verification(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "step-2"
    subprocess.run(["cp", "-r", str(trained / "checkpoints" / "step-2"), str(copy)], check=True)
    largest = max((file for file in copy.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert main(["ckpt", "verify", str(tmp_path)]) == ExitCode.FAILED
    assert "sound" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.num_steps", "3"], "unknown config key trainer.num_steps: did you mean num_train_steps?"),
        (["--trainer.num_train_steps", "many"], "num_train_steps"),
        (["--trainer.num_train_steps", "-3"], "num_train_steps=-3 must be positive"),
        (["--output_path.x", "1"], "output_path is"),
        (["--trainer.mesh", "{data: [}"], "--trainer.mesh '{data: [}' is no YAML"),
        (["--trainer.train_batch_size", "6"], "train_batch_size=6 does not divide"),
        (["--model.vocab_size", "200"], "smaller than the 300 tokens"),
        (["--name", "x"], "--name=x goes with --text"),
        (["--trainer.trackers", "[wandb]"], "must be a list of mappings, such as [{type: wandb}]"),
        (["--optimizer.type", "levanter", "--optimizer.levanter", "adam"], "must be a mapping such as {type: adam}"),
        (["--eval.sample_prompts", "[grug brain]", "--eval.sample_tokens", "32"], "do not fit in model.max_seq_len=32"),
    ],
)
def test_a_mistake_is_answered_in_a_line(
    config_file: Path, tmp_path: Path, capsys: Capture, arguments: list[str], words: str
) -> None:
    base = ["train", "--config_path", str(config_file)]
    if not arguments[0].startswith("--output_path"):
        base += ["--output_path", str(tmp_path / "none")]
    with without_runtime_types():
        assert main([*base, *arguments]) == ExitCode.REFUSED
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.startswith("grug: ")
    assert "Traceback" not in printed.err
    assert not (tmp_path / "none" / "checkpoints").exists() or not any((tmp_path / "none" / "checkpoints").iterdir())


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: Capture) -> None:
    for command in (["sample"], ["eval"], ["plan"], ["plot"], ["ckpt", "ls"], ["ckpt", "verify"]):
        assert main([*command, str(tmp_path)]) == ExitCode.REFUSED
    assert main(["plan", str(tmp_path / "none.yaml")]) == ExitCode.REFUSED
    assert "none.yaml: give the YAML of a run, or the folder of one" in capsys.readouterr().err


def test_a_plan_refuses_what_training_does(config_file: Path, capsys: Capture) -> None:
    for name, value, words in (
        ("data.tokenzer", "gpt2", "unknown config key data.tokenzer: did you mean tokenizer?"),
        ("data.components", "[caves]", "data.components=['caves'] must be a mapping"),
        ("data.components", "null", "data.components=null must be a mapping"),
        ("data.train_weights", "[1]", "data.train_weights=[1] must be the weights of the components"),
        ("data.train_weights", "{caves: null}", "must be the weights of the components"),
        ("data.mixture_block_size", "many", "data.mixture_block_size='many' must be of type int"),
    ):
        assert main(["plan", str(config_file), f"--{name}", value]) == ExitCode.REFUSED
        assert words in capsys.readouterr().err


def test_text_around_its_own_runs_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(make_text(0, 30_000))
    small = ["--model.hidden_dim=32", "--model.intermediate_dim=64", "--model.num_layers=1", "--model.num_heads=2"]
    small += ["--model.num_kv_heads=2", "--model.vocab_size=2048", "--eval.max_eval_batches=1", "--eval.compute_bpb=no"]
    arguments = ["train", "--text", ".", "--trainer.num_train_steps=2", "--trainer.train_batch_size=4", *small]
    arguments += ["--output_path", "1.10"]
    assert main([*arguments, "--stop_after", "1"]) == 0
    assert main(arguments) == 0
    assert len(list((tmp_path / "runs" / "corpora").iterdir())) == 1
    assert (tmp_path / "1.10" / "checkpoints" / "step-2").is_dir()
    # A tokenizer that is given is the one that the texts are made into tokens with.
    (tokenizer,) = (tmp_path / "runs" / "corpora").glob("*/tokenizer")
    shutil.rmtree(tmp_path / "1.10")
    shutil.copytree(tokenizer, tmp_path / "own" / "tokenizer")
    given = [*arguments[:-1], "other", f"--data.tokenizer={tmp_path}/own/tokenizer", "--model.max_seq_len=64"]
    assert main([*given, "--stop_after", "1"]) == 0
    data = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["data"]
    assert data["tokenizer"] == str(tmp_path / "own" / "tokenizer")
    assert not Path(data["cache_dir"]).is_relative_to(tokenizer.parent)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.num_steps", "3"], "unknown config key trainer.num_steps: did you mean num_train_steps?"),
        (["--model.hidden", "3"], "unknown config key model.hidden"),
        (["--data.tokenzer", "x"], "unknown config key data.tokenzer: did you mean tokenizer?"),
        (["--trainer.train_batch_size", "6"], "train_batch_size=6 does not divide"),
        (["--trainer.train_seq_len", "100000"], "train_seq_len=100000 is longer than model.max_seq_len"),
        (["--name", "a/.."], "run_id='..' must be"),
        (["--name", "-x"], "run_id='-x' must be"),
        (["--output_path", "a://b"], "must be a folder of a POSIX file system"),
        (["--stop_after", "-1"], "stop_after=-1 must not be negative"),
        (["--resume_step", "7"], "runs/texts/checkpoints holds no checkpoint"),
        (["--data.tokenizer", "./nowhere"], "data.tokenizer='./nowhere' is no folder here"),
    ],
)
def test_what_needs_no_data_is_checked_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "rotten.parquet").write_text("Whoever reads this, complains of it.")
    assignments = [f"{arguments[0]}={arguments[1]}"]
    with without_runtime_types():
        assert main(["train", "--text", "texts", *assignments]) == ExitCode.REFUSED
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_text_key_goes_with_text(config_file: Path, capsys: Capture) -> None:
    assert main(["train", "--config_path", str(config_file), "--text_key", "body"]) == ExitCode.REFUSED
    assert "--text_key=body goes with --text" in capsys.readouterr().err


def test_text_that_grew_is_told_and_the_run_keeps_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for number in range(2):
        (tmp_path / "mine" / f"{number}.txt").write_text(make_text(number, 12_000))
    small = ["--model.hidden_dim=32", "--model.intermediate_dim=64", "--model.num_layers=1", "--model.num_heads=2"]
    small += ["--model.num_kv_heads=2", "--model.vocab_size=2048", "--eval.max_eval_batches=1", "--eval.compute_bpb=no"]
    arguments = ["train", "--text", "mine", "--trainer.num_train_steps=3", "--trainer.train_batch_size=4", *small]
    assert main([*arguments, "--stop_after", "1"]) == 0
    (tmp_path / "mine" / "0.txt").write_text("changed\n" + make_text(0, 12_000))
    (tmp_path / "mine" / "new.txt").write_text("entirely other words, again and again " * 2000)
    capsys.readouterr()
    assert main([*arguments, "--stop_after", "2"]) == ExitCode.REFUSED
    told = capsys.readouterr().err
    assert "1 file came (new.txt, 76,000 bytes); 1 file changed (0.txt, " in told
    assert "tokenizer" not in told and "'--trainer.allow_changes=[data_fingerprint]'" in told
    allowed = [*arguments, "--trainer.allow_changes", "data_fingerprint"]
    assert main([*allowed, "--stop_after", "2"]) == 0
    data = json.loads((tmp_path / "runs" / "mine" / "data.json").read_text())
    assert ["new.txt" in record["files"] for record in data.values()] == [False, True]
    # What was allowed once holds no more; and the tokenizer that these texts alone would make is refused for good.
    (tmp_path / "mine" / "new.txt").unlink()
    assert main([*arguments, "--stop_after", "3"]) == ExitCode.REFUSED
    assert "1 file went (new.txt" in capsys.readouterr().err
    other = ["--trainer.allow_changes", "[data_fingerprint, tokenizer_digest]"]
    assert main(["train", "--text", "mine", "--name", "other", *arguments[3:], "--stop_after", "0"]) == 0
    data = yaml.safe_load((tmp_path / "runs" / "other" / "config.yaml").read_text())["data"]
    other += [f"--data.tokenizer={data['tokenizer']}", f"--data.cache_dir={data['cache_dir']}"]
    assert main([*arguments, *other]) == ExitCode.REFUSED
    assert "The tokenizer cannot change under trained parameters" in capsys.readouterr().err


def test_changed_mathematics_and_a_held_lock_have_codes_of_their_own(trained: Path, capsys: Capture) -> None:
    assert main(["train", "--config_path", str(trained), "--trainer.seed", "9"]) == ExitCode.REFUSED
    assert "trainer.seed: stored 0, wanted 9" in capsys.readouterr().err
    lock = RunLock(trained, "run")
    try:
        assert main(["train", "--config_path", str(trained), "--trainer.log_every", "2"]) == ExitCode.LOCKED
    finally:
        lock.release()


def test_debug_shows_the_traceback(config_file: Path) -> None:
    with pytest.raises(ValueError, match="num_steps"):
        main(["train", "--debug", "--config_path", str(config_file), "--trainer.num_steps", "3"])


def test_an_error_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: Any) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("grug_native.cli.commands.plot", broken)
    with pytest.raises(AssertionError, match="ours"):
        main(["plot", str(tmp_path)])


def test_errors_have_their_exit_codes() -> None:
    from grug_native.checkpoint.metadata import CheckpointError, CheckpointMismatchError, NoUsableCheckpointError
    from grug_native.host.run_folder import RunLockedError
    from grug_native.launch.exit_codes import explain
    from grug_native.loop import EvaluationError
    from grug_native.step_log import NonFiniteError

    for error, code in (
        (NoUsableCheckpointError("x"), 3),
        (RunLockedError("x"), 4),
        (CheckpointMismatchError("x"), 2),
        (FileNotFoundError("x"), 2),
        (CheckpointError("x"), 1),
        (NonFiniteError("x"), 1),
        (EvaluationError("x"), 1),
        (OSError("x"), 1),
    ):
        assert explain(error) == (code, "x")
    explained = explain(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"))
    assert explained is not None
    assert "trainer.microbatch_size=auto" in explained[1]
    assert explain(jax.errors.JaxRuntimeError("INTERNAL: x")) is None
    assert explain(TypeError("x")) is None


def test_overrides_may_stand_anywhere(capsys: Capture) -> None:
    overrides, rest = split_overrides(["plan", "--a.b", "-1", "run.yaml", "--c.d.e=x=y", "--measure", "3"])
    assert overrides == [("a.b", "-1"), ("c.d.e", "x=y")]
    assert rest == ["plan", "run.yaml", "--measure", "3"]
    for arguments, words in (
        (["eval", "run", "--trainer.seed", "1"], "--trainer.seed is a field of a run's config"),
        (["train", "--config_path", "run.yaml", "--trainer.seed"], "--trainer.seed wants a value"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_text_may_stand_before_and_after_options() -> None:
    parser, verbs = build_parser()
    for verb, orders, expected in (
        (
            ("sample",),
            (
                ["RUN", "--temperature", "0", "Once upon"],
                ["--temperature", "0", "RUN", "Once upon"],
                ["RUN", "Once upon"],
            ),
            {"run": "RUN", "prompts": ["Once upon"]},
        ),
        (("sample",), (["RUN", "--seed", "-1", "--", "-x"], ["RUN", "--", "-x"]), {"run": "RUN", "prompts": ["-x"]}),
        (("plot",), (["a", "--output", "o", "b"], ["--output", "o", "a", "b"]), {"runs": ["a", "b"], "output": "o"}),
        (("plan",), (["--measure", "3", "RUN"], ["RUN", "--measure", "3"]), {"config": "RUN", "measure": 3}),
        (("eval",), (["--step", "2", "RUN"], ["RUN", "--step", "2"]), {"run": "RUN", "step": 2}),
        (
            ("harness",),
            (["--tasks", "a", "b", "RUN"], ["RUN", "--tasks", "a", "b"], ["--tasks", "a", "b", "--debug", "RUN"]),
            {"run": "RUN", "tasks": ["a", "b"]},
        ),
        (
            ("ckpt", "diff"),
            (["RUN", "2", "--values", "4"], ["--values", "RUN", "2", "4"]),
            {"run": "RUN", "a": 2, "b": 4},
        ),
        (("ckpt", "verify"), (["--step", "2", "RUN"],), {"run": "RUN", "step": 2}),
    ):
        for words in orders:
            parsed = parse(parser, verbs, [*verb, *words])
            assert {name: getattr(parsed, name) for name in expected} == expected, words
    with pytest.raises(SystemExit):
        parse(parser, verbs, ["harness", "--tasks", "a"])
    assert split_overrides(["sample", "RUN", "--", "--a.b"]) == ([], ["sample", "RUN", "--", "--a.b"])


def test_words_that_are_no_utf_8_are_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sample", "RUN", os.fsdecode(b"caf\xe9")])
    assert ended.value.code == ExitCode.REFUSED
    assert "is no UTF-8: its byte 0xe9" in capsys.readouterr().err


def test_what_a_refusal_offers_can_be_pasted_into_a_shell(trained: Path, capsys: Capture) -> None:
    changed = ["--trainer.seed", "9", "--optimizer.weight_decay=0.2"]
    assert main(["train", "--config_path", str(trained), *changed]) == ExitCode.REFUSED
    said = capsys.readouterr().err
    offered = re.findall(r"'--[^']*'", said)
    assert len(offered) == 1
    show = f"{shlex.quote(sys.executable)} -c 'import sys, json; print(json.dumps(sys.argv[1:]))'"
    words = json.loads(subprocess.run(f"{show} {offered[0]}", shell=True, check=True, capture_output=True).stdout)
    [(name, value)], rest = split_overrides(words)
    assert (name, rest) == ("trainer.allow_changes", [])
    assert set(yaml.safe_load(value)) == {"optimizer.weight_decay", "trainer.seed"}


def test_every_command_explains_itself(capsys: Capture) -> None:
    for command in ("train", "plan", "eval", "harness", "sample", "plot", "ckpt"):
        with pytest.raises(SystemExit) as ended:
            build_parser()[0].parse_args([command, "--help"])
        assert ended.value.code == 0
        assert "exit codes" in capsys.readouterr().out


def test_light_commands_import_nothing_heavy(trained: Path) -> None:
    for arguments in (["--help"], ["ckpt", "ls", str(trained)], ["ckpt", "verify", str(trained)]):
        code = (
            "import sys; from grug_native.cli.main import main\n"
            f"try: main({arguments!r})\nexcept SystemExit: pass\n"
            "print([name for name in ('jax', 'levanter', 'orbax', 'matplotlib') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        assert done.stdout.splitlines()[-1] == "[]"


def test_plan_of_a_file_does_not_import_levanter(config_file: Path, tmp_path: Path) -> None:
    fresh = yaml.safe_load(config_file.read_text()) | {"output_path": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fresh))
    code = (
        f"import sys; from grug_native.cli.main import main; main(['plan', {str(tmp_path / 'run.yaml')!r}]); "
        "print('levanter' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "False"


def test_sampling_imports_no_data_stack(trained: Path) -> None:
    code = (
        f"import sys; from grug_native.cli.main import main; main(['sample', {str(trained)!r}, 'a'])\n"
        "print([name for name in ('levanter.data', 'haliax', 'pyarrow', 'orbax', 's3fs') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_config_with_overrides_round_trips(make_run: MakeRun) -> None:
    from grug_native.config import config_from_dict, with_overrides

    raw = config_to_dict(make_run())
    changed = with_overrides(
        raw, [("trainer.mesh.data", "2"), ("optimizer.learning_rate", "1e-3"), ("eval.harness", "null")]
    )
    config = config_from_dict(changed)
    assert isinstance(config.optimizer, AdamWConfig)
    assert (config.trainer.mesh.data, config.optimizer.learning_rate) == (2, 1e-3)
    assert raw == config_to_dict(make_run())
    muon = config_from_dict(with_overrides(raw, [("optimizer.momentum", "0.9"), ("optimizer.type", "muon")])).optimizer
    assert isinstance(muon, MuonConfig) and (muon.momentum, muon.schedule.warmup) == (0.9, 2)
    assert muon.learning_rate == MuonConfig().learning_rate  # AdamW's would be wrong for it
    same = [("optimizer.type", "grug_native.optimizer:AdamWConfig")]
    assert config_from_dict(with_overrides(raw, same)).optimizer == config_from_dict(raw).optimizer
    nameless = raw | {"optimizer": {"learning_rate": 0.02}}
    assert config_from_dict(with_overrides(nameless, [("optimizer.type", "adamw")])).optimizer == AdamWConfig(
        learning_rate=0.02
    )
