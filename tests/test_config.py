import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from levanter.data.text.datasets import LmDataConfig
from levanter.optim.config import OptimizerConfig
from levanter.schedule import BatchSchedule, ScheduleStep
from levanter.tracker.tracker import NoopConfig
from levanter.tracker.wandb import WandbConfig

from grug_native.config import (
    COSMETIC_FIELDS,
    GrugTrainerConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
    with_overrides,
)
from grug_native.evaluation.config import GrugEvalConfig, GrugHarnessConfig
from grug_native.levanter_optimizer import LevanterOptimizer
from grug_native.optimizer import AdamWConfig, GroupConfig
from grug_native.parsing.check import DATA_KEYS
from grug_native.parsing.named_types import decode_named
from grug_native.sharding import MeshAxes
from tests.fixtures_run import SMALL_MODEL, MakeRun, without_runtime_types


def test_yaml_round_trips(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(
        trainer={
            "train_batch_size": ((0, 4), (3, 8)),
            "mesh": MeshAxes(model=2),
            "trackers": (NoopConfig(),),
            "ema_beta": 0.9,
        },
        optimizer={"type": "muon", "warmup": 0.25, "max_grad_norm": None},
        eval=GrugEvalConfig(steps_per_eval=3, harness=GrugHarnessConfig(tasks=("piqa", {"task": "mine"}), limit=3)),
    )
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert config_to_dict(again) == config_to_dict(config)


def test_levanters_optimizers_round_trip(make_run: MakeRun) -> None:
    lion = OptimizerConfig.get_choice_class("lion")(learning_rate=0.5)
    config = replace(make_run(), optimizer=LevanterOptimizer(levanter=lion))
    assert config_from_dict(config_to_dict(config)) == config


def test_defaults_need_not_be_written(make_run: MakeRun) -> None:
    raw = config_to_dict(make_run())
    model = {name: raw["model"][name] for name in ("vocab_size", "hidden_dim", "intermediate_dim", "max_seq_len")}
    model |= {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    trainer = {"num_train_steps": 8, "train_batch_size": 4}
    optimizer = {"learning_rate": 1e-2, "schedule": {"warmup": 2}}
    short = {"model": model, "data": raw["data"], "trainer": trainer, "optimizer": optimizer}
    assert config_from_dict(short | {"output_path": raw["output_path"]}) == make_run()


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("modle", "model"),
        ("model.hiden_dim", "hidden_dim"),
        ("model.rope.tetha", "theta"),
        ("trainer.num_steps", "num_train_steps"),
        ("trainer.mesh.dta", "data"),
        ("optimizer.learning_rte", "learning_rate"),
        ("eval.step_per_eval", "steps_per_eval"),
        ("eval.harness.taks", "tasks"),
        ("data.tokenzer", "tokenizer"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(make_run: MakeRun, path: str, nearest: str) -> None:
    raw = config_to_dict(make_run(eval=GrugEvalConfig(harness=GrugHarnessConfig(tasks=("piqa",)))))
    *parents, key = path.split(".")
    section: dict[str, Any] = raw
    for parent in parents:
        section = section[parent]
    section[key] = 1
    with pytest.raises(ValueError) as error:
        config_from_dict(raw)
    assert str(error.value) == f"unknown config key {path}: did you mean {nearest}?"


def test_a_key_like_no_other_is_answered_with_all(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="unknown config key xyzzy: the keys here are model, data, optimizer"):
        config_from_dict(config_to_dict(make_run()) | {"xyzzy": 1})


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("trainer", "num_train_steps", "many", ["num_train_steps", "many"]),
        ("trainer", "num_train_steps", None, ["trainer.num_train_steps is null", "int"]),
        ("model", "attention", "flash", ["model.attention: Cannot convert 'flash' into one of: auto, reference"]),
        ("data", "train_weights", {"cave": 1.0}, ["data.train_weights names ['cave']", "['caves', 'clubs']"]),
        (
            "data",
            "components",
            {"caves": {"sorce": 1}, "clubs": {}},
            ["data.components.caves: The fields sorce are not valid"],
        ),
        ("trainer", "trackers", [{"type": "wandbb"}], ["trainer.trackers.type='wandbb' is unknown", "wandb, "]),
        ("eval", "harness", {"tasks": []}, ["eval.harness.tasks is empty"]),
        ("trainer", "num_train_steps", 0, ["num_train_steps=0", "positive"]),
        ("trainer", "num_train_steps", -5, ["num_train_steps=-5", "positive"]),
        ("trainer", "train_batch_size", 0, ["train_batch_size=0", "positive"]),
        ("trainer", "microbatch_size", 3, ["trainer.microbatch_size=3", "batch of 4 sequences"]),
        ("trainer", "train_batch_size", [[1, 4]], ["train_batch_size", "the first at step 0"]),
        ("trainer", "train_batch_size", [[0, 4], [0, 8]], ["each later than the one before"]),
        ("trainer", "log_every", 0, ["log_every=0"]),
        ("trainer", "ema_beta", 1.0, ["ema_beta=1.0", "[0, 1)"]),
        ("trainer", "z_loss_weight", -1.0, ["z_loss_weight=-1.0"]),
        ("trainer", "train_seq_len", 1, ["train_seq_len=1", "at least 2"]),
        ("trainer", "train_seq_len", 64, ["train_seq_len=64", "max_seq_len=32"]),
        ("trainer", "run_id", "../up", ["run_id='../up'"]),
        ("trainer", "max_skipped_steps", -1, ["max_skipped_steps=-1"]),
        ("eval", "steps_per_eval", 0, ["steps_per_eval=0"]),
        ("trainer", "trackers", "wandb", ["trainer.trackers=['wandb'] must be a list of mappings", "[{type: wandb}]"]),
        ("trainer", "trackers", ["wandb"], ["trainer.trackers=['wandb'] must be a list of mappings"]),
        ("trainer", "trackers", None, ["trainer.trackers=null must be a list", "[] for none"]),
        ("trainer", "mesh", 8, ["trainer.mesh=8 must be a mapping with keys such as replica_dcn, data, expert"]),
        ("trainer", "run_id", 1.1, ["trainer.run_id=1.1 must be text: put it in quotes"]),
        ("trainer", "train_batch_size", None, ["trainer.train_batch_size is null", "int | tuple"]),
        ("trainer", "allow_changes", 3, ["trainer.allow_changes=3 must be a list"]),
        ("optimizer", "type", "levanter", ["optimizer.levanter=null must be a mapping such as {type: adam}"]),
        ("optimizer", "type", "adam", ["optimizer.type='adam' is unknown: choose one of adamw, muon, lion, levanter"]),
        ("optimizer", "type", "nowhere.at:All", ["there is no module nowhere: install its package, or start in the"]),
        ("optimizer", "type", "json:dumps", ["must be a frozen dataclass with build and build_schedule and groups"]),
        ("model", "type", "grug_native.model:Llama", ["must be a frozen dataclass with init; it is None"]),
        ("model", "type", "experiments.variants.modded:ModdedConfig", ["unknown config key model.intermediate_dim"]),
        ("eval", "harness", "blimp", ["eval.harness='blimp' must be a mapping with keys such as tasks"]),
        ("eval", "sample_prompts", [{"Once": "upon"}], ["eval.sample_prompts=", "must be text: put it in quotes"]),
        ("data", "components", ["caves"], ["data.components=['caves'] must be a mapping"]),
        ("data", "components", {"caves": None}, ["data.components.caves=null must be a mapping"]),
        ("data", "train_weights", 3, ["data.train_weights=3 must be the weights", "[[0, {a: 1}]"]),
        ("data", "train_weights", [[0, 3]], ["data.train_weights=[[0, 3]] must be the weights"]),
        ("data", "tokenizer", None, ["data.tokenizer=null must be of type str"]),
    ],
)
def test_bad_values_are_refused(make_run: MakeRun, section: str, key: str, value: Any, words: list[str]) -> None:
    raw = config_to_dict(make_run())
    raw[section][key] = value
    with without_runtime_types(), pytest.raises(ValueError) as error:
        config_from_dict(raw)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("section", ["model", "data", "optimizer", "trainer", "eval"])
@pytest.mark.parametrize("value", [None, "tiny", [1]])
def test_a_section_that_is_no_mapping_is_named(make_run: MakeRun, section: str, value: Any) -> None:
    shown = "null" if value is None else repr(value)
    with pytest.raises(ValueError) as error:
        config_from_dict(config_to_dict(make_run()) | {section: value})
    assert f"{section}={shown} must be a mapping with keys such as " in str(error.value)
    assert ("leave it out for the defaults" in str(error.value)) == (section == "eval")


def test_a_lone_value_is_taken_for_a_list_of_one(make_run: MakeRun) -> None:
    raw = config_to_dict(make_run())
    raw["trainer"] |= {"allow_changes": "trainer.seed", "trackers": {"type": "wandb"}}
    raw["eval"] |= {"sample_prompts": "hello", "harness": {"tasks": "blimp"}}
    config = config_from_dict(raw)
    assert config.trainer.allow_changes == ("trainer.seed",)
    assert [type(tracker) for tracker in config.trainer.trackers] == [WandbConfig]
    assert config.eval.sample_prompts == ("hello",)
    assert config.eval.harness is not None and config.eval.harness.tasks == ("blimp",)
    raw["eval"]["harness"] = {"tasks": {"task": "mine"}}
    harness = config_from_dict(raw).eval.harness
    assert harness is not None and harness.tasks == ({"task": "mine"},)


@pytest.mark.parametrize(
    ("name", "typed", "read"),
    [
        ("output_path", "1.10", "1.10"),
        ("output_path", "yes", "yes"),
        ("output_path", "runs/[x", "runs/[x"),
        ("trainer.run_id", "1.10", "1.10"),
        ("trainer.run_id", "null", None),
        ("eval.harness.include_path", "2024-01-01", "2024-01-01"),
        ("eval.sample_prompts", "Once upon a time: grug", "Once upon a time: grug"),
        ("eval.sample_prompts", "[yes, no]", [True, False]),
        ("trainer.mesh.data", "2", 2),
        ("data.tokenizer", "gpt2", "gpt2"),
        ("nothing.like.it", "1.10", 1.1),
    ],
)
def test_what_is_text_stays_as_it_is_typed(name: str, typed: str, read: Any) -> None:
    changed: Any = with_overrides({}, [(name, typed)])
    for key in name.split("."):
        changed = changed[key]
    assert changed == read


def test_the_keys_of_the_data_are_levanters() -> None:
    assert [field.name for field in fields(LmDataConfig)] == list(DATA_KEYS)


def test_an_output_path_that_is_a_file_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match=r"output_path=.*taken.*must be a folder"):
        make_run(name="taken")


def test_a_file_without_sections_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("- just\n- a list\n")
    with pytest.raises(ValueError, match="holds no mapping"):
        load_config(tmp_path / "config.yaml")


def test_yaml_is_loaded_safely(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="is no YAML"):
        load_config(tmp_path / "config.yaml")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 60))
def test_batch_stages_count_as_levanters_do(stages: list[tuple[int, int]], step: int) -> None:
    starts = [sum(length for length, _ in stages[:i]) for i in range(len(stages))]
    schedule = tuple((start, size) for start, (_, size) in zip(starts, stages, strict=True))
    ours = GrugTrainerConfig(num_train_steps=1, train_batch_size=schedule)
    theirs = BatchSchedule([ScheduleStep(start, size) for start, size in schedule])
    assert ours.batch_size_at(step) == theirs.batch_size_at_step(step)
    assert ours.data_offset(step) == theirs.global_data_offset_by_step(step)


def test_cosmetic_fields_exist(make_run: MakeRun) -> None:
    raw = config_to_dict(make_run())
    for path in COSMETIC_FIELDS:
        section: Any = raw
        for key in path.split("."):
            section = section[key]


def test_a_config_is_named_after_its_folder(make_run: MakeRun) -> None:
    assert make_run(name="first").run_id == "first"
    assert make_run(trainer={"run_id": "other"}).run_id == "other"
    assert make_run().seq_len == SMALL_MODEL.max_seq_len
    assert make_run(trainer={"train_seq_len": 16}).seq_len == 16


def test_a_config_is_readable_when_printed(make_run: MakeRun) -> None:
    text = repr(make_run())
    assert max(map(len, text.splitlines())) < 140
    assert "learning_rate=0.01" in text
    assert text.startswith("model: GrugModelConfig(")


def test_a_config_is_read_by_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: 3")
    with pytest.raises(ValueError, match="model=3 must be a mapping"):
        load_config(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("name", ["seed", "data_seed"])
def test_a_seed_has_32_bits(name: str) -> None:
    for seed in (2**70, 2**32, -(2**31) - 1):
        with pytest.raises(ValueError, match=rf"trainer\.{name}={seed} must lie in"):
            GrugTrainerConfig(num_train_steps=1, train_batch_size=1, **{name: seed})


def test_a_class_is_found_in_the_folder_where_the_program_starts(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.py").write_text(
        "from grug_native.optimizer import AdamWConfig\nclass Own(AdamWConfig): pass\n"
    )
    program = (
        "import sys; sys.path.remove('')\n"
        "from grug_native.parsing.named_types import decode_named\n"
        "print(decode_named('optimizer', {'type': 'mine.own:Own', 'beta1': 0.5}).beta1)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "0.5\n", done.stderr


def test_a_group_given_in_part_keeps_the_rest_of_its_default() -> None:
    optimizer = decode_named("optimizer", {"embedding": {"learning_rate": 0.01}})
    assert optimizer == AdamWConfig(embedding=GroupConfig(learning_rate=0.01, weight_decay=0.0))
