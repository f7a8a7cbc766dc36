import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import pytest
from rich.console import Console

from grug_native.checkpoint.metadata import NoUsableCheckpointError
from grug_native.components import RunParts
from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig
from grug_native.data.sketch import DataSketch
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.host.process import GPU_FLAGS
from grug_native.optimizer import MuonConfig
from grug_native.plan import build_plan, tokenizer_size
from grug_native.recommended import recommended_in_words
from grug_native.run_plan import RunPlan
from grug_native.runner import GrugRunner
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import MeshAxes
from tests.accelerators import HOPPER, pretend
from tests.fixtures_run import SMALL_MODEL, MakeRun

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig

SKETCH = DataSketch.of({"components": {"caves": {}, "clubs": {}}, "train_weights": [[0, {"caves": 3, "clubs": 1}]]})


def sketched(folder: Path, data: Any = SKETCH, **trainer: Any) -> GrugNativeRunConfig:
    """A run whose data are only described."""
    fields: dict[str, Any] = {"num_train_steps": 100, "train_batch_size": 8} | trainer
    return GrugNativeRunConfig(
        model=SMALL_MODEL,
        data=data,
        optimizer=MuonConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=10)),
        trainer=GrugTrainerConfig(**fields),
        output_path=str(folder / "run"),
    )


def plan_of(config: GrugNativeRunConfig) -> RunPlan:
    return GrugRunner(config).plan()


def test_the_numbers(tmp_path: Path) -> None:
    plan = plan_of(sketched(tmp_path, train_batch_size=((0, 8), (50, 16)), steps_per_checkpoint=25))
    embed, layer = 300 * 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert plan.parameters == {
        "embed": embed,
        "blocks.attn_norm": 2 * 32,
        "blocks.attn": 2 * (2 * 32 * 32 + 2 * 32 * 16),
        "blocks.mlp_norm": 2 * 32,
        "blocks.mlp": 2 * 3 * 32 * 48,
        "final_norm": 32,
        "lm_head": embed,
        "total": 2 * embed + 2 * layer + 5 * 32,
    }
    assert plan.tokens == (50 * 8 + 50 * 16) * 32
    assert plan.tokens_per_parameter == plan.tokens / plan.parameters["total"]
    # Every parameter is a leaf; what Muon has needs one moment, AdamW's two; step, key (of two words) and counters.
    assert plan.checkpoint_bytes == 4 * (2 * 2 * layer + 3 * (2 * embed + 5 * 32) + 1 + 2 + 3)
    assert plan.disk_needed == int(6.2 * plan.checkpoint_bytes)
    assert dict(plan.learning_rates)[0] == pytest.approx(1e-3)
    assert plan.learning_rates[-1] == (99, pytest.approx(1e-3))
    assert plan.mixture == ((0, {"caves": 0.75, "clubs": 0.25}),)
    assert plan.mesh == {"replica_dcn": 1, "data": 4, "expert": 1, "model": 1}
    assert plan.shardings[".blocks.attn.wq"] == "-, data, model"
    groups = {group.path: group.group for group in plan.routing}
    assert groups[".blocks.mlp.up"] == "muon, rate 0.01, decay 0.1"
    assert groups[".embed"] == "adamw, rate 0.01"
    assert plan.recommended == recommended_in_words(32) and "recommended" in str(plan)
    choices = {choice.what: choice.name for choice in plan.choices}
    assert {what: name for what, name in choices.items() if what.islower()} == {
        "attention": "blocked",
        "cross-entropy": "full",
        "compute dtype": "float32",
        "layers": "unrolled",
        "recomputed": "none",
    }
    assert choices["XLA_FLAGS"] == os.environ.get("XLA_FLAGS", "not set")
    assert {"GLIBC_TUNABLES", "JAX_COMPILATION_CACHE_DIR"} <= choices.keys()
    assert all(choice.reason for choice in plan.choices)
    assert (plan.memory, plan.timing, plan.vocabulary, plan.resumes_from) == (None, None, None, None)


def test_on_a_gpu_it_names_what_is_chosen_there(tmp_path: Path) -> None:
    with pretend(HOPPER):
        choices = {choice.what: choice for choice in plan_of(sketched(tmp_path)).choices}
    assert "packed layout" in choices["attention"].reason and choices["attention"].name == "cudnn"
    assert choices["compute dtype"].name == "bfloat16"
    assert "beside the state" in choices["recomputed"].reason
    assert choices["XLA flag"].name in GPU_FLAGS


def test_the_passes_of_a_batch_are_said(tmp_path: Path) -> None:
    def microbatch(plan: RunPlan) -> tuple[str, str]:
        return next((choice.name, choice.reason) for choice in plan.choices if choice.what == "microbatch")

    asked = plan_of(sketched(tmp_path, microbatch_size=4))
    assert microbatch(asked) == ("4", "asked for by the config: 2 passes a step")
    assert any("added up over devices once a step" in choice.name for choice in asked.choices)
    runner = GrugRunner(sketched(tmp_path, microbatch_size="auto"))
    assert microbatch(runner.plan())[0] == "auto"
    name, reason = microbatch(runner.plan(compile=True))
    assert name == "8" and "does not tell how much memory" in reason


def test_it_prints_as_a_table(tmp_path: Path) -> None:
    plan = plan_of(sketched(tmp_path))
    text = str(plan)
    for words in (
        "34,720",
        "muon, rate 0.01",
        "caves 75.0%",
        "data=4",
        "blocked: dense",
        "8 sequences",
        "compile=True",
    ):
        assert words in text
    assert repr(plan) == text
    console = Console(width=110, record=True, file=StringIO())
    console.print(plan)
    assert console.export_text() == text


def test_nothing_is_imported_that_it_does_not_need(tmp_path: Path) -> None:
    """With the data described, it costs little more than importing the model."""
    code = (
        "import sys; from pathlib import Path; from tests.test_plan import plan_of, sketched; "
        f"plan_of(sketched(Path({str(tmp_path)!r}))); "
        "print([name for name in ('levanter', 'haliax', 'orbax', 'lm_eval', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_and_time_on_request(make_run: MakeRun) -> None:
    config = make_run(eval=GrugEvalConfig(max_eval_batches=1))
    plan = GrugRunner(config).plan(compile=True, measure=2)
    assert plan.memory is not None
    assert plan.timing is not None
    # Parameters, two moments of each and the batch are split over four devices.
    assert plan.checkpoint_bytes / 4 < plan.memory.state < plan.checkpoint_bytes
    assert plan.memory.peak >= plan.memory.state + plan.memory.working
    assert plan.timing.train_seconds == pytest.approx(8 * plan.timing.step_seconds)
    assert plan.vocabulary == 300
    assert not Path(config.output_path).exists()
    assert "tokens/s" in str(plan)


def test_it_says_where_a_run_goes_on(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run(eval=GrugEvalConfig(max_eval_batches=1)))
    runner.save(runner.init_state())
    plan = runner.plan()
    assert plan.resumes_from == 0
    assert "goes on from step 0" in str(plan)


def test_it_refuses_what_training_does(make_run: MakeRun, small_corpus: "LmDataConfig") -> None:
    few = GrugEvalConfig(max_eval_batches=1)
    runner = GrugRunner(make_run(eval=few))
    runner.fit(stop_after=1)
    data = replace(small_corpus, mixture_block_size=16)
    for changes in (
        {"model": replace(SMALL_MODEL, num_layers=1)},
        {"trainer": {"train_batch_size": 8, "allow_changes": ("trainer.train_batch_size",)}},
        {"optimizer": {"type": "muon"}, "trainer": {"allow_changes": ("optimizer",)}},
        {"data": data},
    ):
        changed = GrugRunner(make_run(eval=few, **changes))
        with pytest.raises(ValueError, match=r"step 1|stored") as planned:
            changed.plan()
        with pytest.raises(type(planned.value)) as trained:
            changed.fit()
        assert str(trained.value) == str(planned.value)
    (runner.run_folder / "checkpoints" / "step-1" / "grug_checkpoint.json").unlink()
    with pytest.raises(NoUsableCheckpointError, match="refusing to start from scratch"):
        runner.plan()


def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"train_batch_size=6 does not divide .* use 4 or 8"):
        plan_of(sketched(tmp_path, train_batch_size=6))
    with pytest.raises(ValueError, match="does not fit 4 device"):
        plan_of(sketched(tmp_path, mesh=MeshAxes(data=3)))
    with pytest.raises(ValueError, match=r"optimizer.schedule.warmup=10 .* more than trainer.num_train_steps=5"):
        plan_of(sketched(tmp_path, num_train_steps=5))
    with pytest.raises(ValueError, match=r"eval.eval_batch_size=3 does not divide over 4 .* use 4"):
        plan_of(replace(sketched(tmp_path), eval=GrugEvalConfig(eval_batch_size=3)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"need \d+\.\d [kM]B, and 1\.0 kB are free: make room"):
        plan_of(sketched(tmp_path))


def test_temporary_checkpoints_make_room_for_those_to_come(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(eval=GrugEvalConfig(max_eval_batches=1), trainer={"keep_last_checkpoints": 2})
    size = GrugRunner(config).plan().checkpoint_bytes
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3 * size // 2}))
    with pytest.raises(OSError, match="make room"):
        GrugRunner(config).plan()
    for step in (1, 2):
        folder = Path(config.output_path) / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "something").touch()
    assert build_plan(RunParts(config, GrugRunner(config).optimizer)).resumes_from == 2


def test_a_vocabulary_that_is_too_small_is_found(tmp_path: Path) -> None:
    tokenizer = {
        "model": {"vocab": {f"token{n}": n for n in range(400)}},
        "added_tokens": [{"content": "token1", "id": 1}, {"content": "<eos>", "id": 400}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert tokenizer_size(str(tmp_path)) == 401
    assert tokenizer_size("some/name") is None
    data = replace(SKETCH, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match=r"model.vocab_size=300 is smaller than the 401 tokens"):
        plan_of(sketched(tmp_path, data))


def test_the_tokenizer_of_a_corpus_is_counted_as_it_counts_itself(make_run: MakeRun) -> None:
    data = make_run().data
    assert tokenizer_size(data.tokenizer) == len(data.the_tokenizer)


def test_a_plan_allocates_nothing(tmp_path: Path) -> None:
    config = sketched(tmp_path)
    before = len(jax.live_arrays())
    build_plan(RunParts(config, GrugRunner(config).optimizer))
    assert len(jax.live_arrays()) <= before + 2
