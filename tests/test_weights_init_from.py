import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from experiments.variants.modded import ModdedConfig
from grug_native.checkpoint.metadata import DamagedCheckpointError, read_metadata
from grug_native.cli.main import main
from grug_native.components import RunParts
from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig, config_from_dict, config_to_dict, save_own_config
from grug_native.data.sketch import DataSketch
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.host.signals import ExitCode
from grug_native.language_model import logits
from grug_native.launch.text_run import text_run
from grug_native.model import GrugModelConfig
from grug_native.optimizer import AdamWConfig
from grug_native.rotary import GrugRopeConfig
from grug_native.runner import GrugRunner
from grug_native.schedule import ScheduleConfig
from grug_native.state import GrugTrainState
from grug_native.tracking.jsonl import read_metrics
from grug_native.weights.config import InitFrom
from tests.fixtures_data import make_text
from tests.fixtures_run import SMALL_MODEL, make_batch

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig

CHANCE = float(np.log(SMALL_MODEL.vocab_size))


class Source(NamedTuple):
    """A run that has learned something, and its export."""

    config: GrugNativeRunConfig
    state: GrugTrainState
    loss: float
    hf: Path

    @property
    def run(self) -> Path:
        return Path(self.config.output_path)


@pytest.fixture(scope="module")
def source(small_corpus: "LmDataConfig", tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("source")
    config = GrugNativeRunConfig(
        model=SMALL_MODEL,
        data=small_corpus,
        optimizer=AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=2)),
        trainer=GrugTrainerConfig(num_train_steps=40, train_batch_size=4, ema_beta=0.5),
        eval=GrugEvalConfig(max_eval_batches=1, eval_ema=False),
        output_path=str(folder / "run"),
    )
    runner, loss = GrugRunner(config), 0.0
    state = runner.init_state()
    for step in range(40):
        state, metrics = runner.train_step(state, runner.batch(step))
        if step in (0, 39):
            runner.save(state)
            loss = float(metrics.loss)
    save_own_config(config)
    assert loss < CHANCE - 1
    return Source(config, state, loss, runner.export(state, folder / "hf", dtype="float32"))


def equal(one: object, other: object) -> bool:
    """Whether two trees are the same, bit for bit."""
    return bool(eqx.tree_equal(one, other))


def started(source: Source, folder: Path, init_from: InitFrom, **changes: Any) -> GrugNativeRunConfig:
    """A new run that starts from there; its data are the source's, in another order."""
    trainer = replace(source.config.trainer, seed=5, init_from=init_from, num_train_steps=4)
    own: dict[str, Any] = {"trainer": trainer, "output_path": str(folder / "new")}
    return replace(source.config, **(own | changes))


def parts_of(config: GrugNativeRunConfig) -> RunParts:
    return RunParts(config, GrugRunner(config).optimizer)


def check(config: GrugNativeRunConfig) -> str:
    """What the run says that it starts with."""
    initial = parts_of(config).initial_parameters
    assert initial is not None
    return initial.described


def test_an_export_read_back_is_the_same_to_the_bit(source: Source, tmp_path: Path) -> None:
    runner = GrugRunner(started(source, tmp_path, InitFrom(source=str(source.hf))))
    state = runner.init_state()
    assert equal(state.params, source.state.params)
    assert equal(state.ema_params, source.state.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == jax.tree.map(
        lambda leaf: leaf.sharding, source.state.params
    )
    fresh = GrugRunner(replace(runner.config, trainer=replace(runner.config.trainer, init_from=None))).init_state()
    assert equal(state.opt_state, fresh.opt_state) and int(state.step) == 0
    np.testing.assert_array_equal(jax.random.key_data(state.training_key), jax.random.key_data(fresh.training_key))
    batch = make_batch()
    with jax.set_mesh(runner.mesh):
        mine, theirs = (
            eqx.filter_jit(logits)(params, batch.tokens, batch.attn_mask)
            for params in (state.params, source.state.params)
        )
    np.testing.assert_array_equal(mine, theirs)


def test_a_run_is_a_source_too_at_any_step_averaged_or_not(source: Source, tmp_path: Path) -> None:
    digests = set[str | None]()
    for asked, wanted in (
        (InitFrom(source=str(source.run)), source.state.params),
        (InitFrom(source=str(source.run), step=40, ema=True), source.state.ema_params),
        (InitFrom(source=str(source.run), step=1), None),
        (InitFrom(source=str(source.hf)), source.state.params),
    ):
        parts = parts_of(started(source, tmp_path, asked))
        params = parts.init_state().params
        assert wanted is None or equal(params, wanted)
        assert parts.origin is not None
        assert parts.origin.step == (None if asked.source == str(source.hf) else asked.step or 40)
        digests.add(parts.origin.digest)
    assert len(digests) == 3  # What is in the run and in its export has one.


def test_a_start_says_and_records_what_it_started_from(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = started(source, tmp_path, InitFrom(source=str(source.run), ema=True))
    folder = Path(asked.output_path)
    said = f"the parameters of {source.run / 'checkpoints' / 'step-40'} (moving average), with a fresh optimizer"
    assert said in str(GrugRunner(asked).plan().starts_with) and not folder.exists()
    with caplog.at_level(logging.INFO):
        GrugRunner(asked).fit(stop_after=2)
    lines = [record.message for record in caplog.records]
    assert lines.index(next(line for line in lines if line.startswith(f"starts with {said}"))) < 4
    first = read_metrics(folder / "metrics.jsonl")[0]
    assert float(first["train/loss"]) < CHANCE - 1 and float(first["eval/loss"]) < CHANCE - 1
    recorded = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["init_from"]
    assert recorded == {"source": str(source.run), "step": 40, "ema": True, "digest": recorded["digest"]}
    (origin,) = read_metadata(folder / "checkpoints" / "step-2").lineage
    assert origin == f"step 0: parameters of {source.run}, step 40, moving average, digest {recorded['digest']}"
    # It goes on from its own checkpoint, even if the source is gone.
    gone = replace(asked.trainer, init_from=InitFrom(source=str(tmp_path / "gone")))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        GrugRunner(replace(asked, trainer=gone)).fit()
    assert f"the parameters of trainer.init_from, {tmp_path / 'gone'}, are not used again" in caplog.text
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["init_from"] == recorded
    assert read_metadata(folder / "checkpoints" / "step-4").lineage == (origin,)
    # Its config makes the same run again, and no other.
    again = config_from_dict(config_to_dict(replace(asked, output_path=str(tmp_path / "again"))))
    same = replace(again, trainer=replace(again.trainer, init_from=InitFrom(**recorded)))
    GrugRunner(same).init_state()
    other = replace(again.trainer, init_from=InitFrom(**recorded | {"ema": False}))
    with pytest.raises(ValueError, match=f"have digest .*, and {recorded['digest']} is asked for: they have changed"):
        GrugRunner(replace(again, trainer=other)).init_state()


def test_text_is_taken_for_the_source() -> None:
    trainer = {"init_from": "runs/a", "num_train_steps": 4, "train_batch_size": 4}
    raw = {"model": SMALL_MODEL, "data": DataSketch(), "optimizer": AdamWConfig(), "trainer": trainer}
    config = config_from_dict(raw | {"output_path": "runs/b"})
    assert config.trainer.init_from == InitFrom(source="runs/a")
    with pytest.raises(ValueError, match=r"unknown config key trainer\.init_from\.stepp: did you mean step"):
        config_from_dict(raw | {"trainer": trainer | {"init_from": {"source": "a", "stepp": 1}}, "output_path": "b"})
    with pytest.raises(ValueError, match=r"init_from\.step=-1 must not be negative"):
        InitFrom(source="a", step=-1)


def test_the_command_line_names_a_source_and_more_of_it(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["train", "--config_path", str(source.run), "--output_path", str(tmp_path / "new")]
    asked = [*own, "--init_from", str(source.run), "--trainer.init_from.step", "7"]
    assert main(asked) == ExitCode.REFUSED
    assert "no checkpoint of step 7: there are 40, 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_each_leaf_and_number_that_does_not_fit_is_listed(kind: str, source: Source, tmp_path: Path) -> None:
    asked = InitFrom(source=str(source.run if kind == "run" else source.hf))
    narrow = replace(SMALL_MODEL, intermediate_dim=16, tie_embeddings=True)
    with pytest.raises(ValueError, match="does not fit, and nothing of it is loaded; give the run the model") as error:
        check(started(source, tmp_path, asked, model=narrow))
    lines = str(error.value).splitlines()[1:]
    typed = (lambda shape: f"float32{shape}") if kind == "run" else str
    head = "lm_head: " if kind == "run" else "lm_head.weight: "
    expected = [
        "  model.intermediate_dim: 48 there, 16 here",
        "  model.tie_embeddings: false there, true here",
        *(f"  blocks.mlp.{n}: {typed([2, 32, 48])} there, {typed([2, 32, 16])} here" for n in ("gate", "up")),
        f"  blocks.mlp.down: {typed([2, 48, 32])} there, {typed([2, 16, 32])} here",
    ]
    if kind == "run":  # Of a folder with a tied head, one that is there too says nothing.
        expected.append(f"  {head}float32[32, 300] there, missing here")
    assert sorted(lines) == sorted(expected)
    with pytest.raises(ValueError, match=r"num_layers: 2 there, 1 here"):
        check(started(source, tmp_path, asked, model=replace(SMALL_MODEL, num_layers=1)))


def test_a_number_may_be_changed_on_purpose(source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turned = started(source, tmp_path, InitFrom(source=str(source.hf)))
    turned = replace(turned, model=replace(SMALL_MODEL, rope=GrugRopeConfig(theta=5.0), max_seq_len=64))
    with pytest.raises(ValueError, match=r"'--trainer\.allow_changes=\[model\.rope\.theta\]':\n.*10000\.0 there, 5\.0"):
        check(turned)
    check(replace(turned, trainer=replace(turned.trainer, allow_changes=("model.rope",))))
    assert "model.rope.theta: 10000.0 there, 5.0 here" in caplog.text


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_another_vocabulary_is_refused(kind: str, source: Source, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    shutil.copytree(source.config.data.tokenizer, other)
    file = other / "tokenizer.json"
    asked = InitFrom(source=str(source.run if kind == "run" else source.hf))
    config = started(source, tmp_path, asked, data=replace(source.config.data, tokenizer=str(other)))
    file.write_text(json.dumps(json.loads(file.read_text())))  # Other bytes, and the same vocabulary.
    check(config)
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"another vocabulary than data\.tokenizer=.*of 2 tokens the ids differ .'!' is"
    ):
        check(config)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def add_bias(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": np.zeros(48, np.float32)}))


def lose_a_layer(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"hf has no tokenizer\.json, so what its ids mean"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json is no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "config.json").unlink(), "is neither the folder of a run, .* nor one of Hugging"),
        (lambda folder: (folder / "config.json").write_text("[1]"), r"config\.json holds no mapping"),
        (lambda folder: (folder / "config.json").write_text("{"), r"hf/config\.json is no JSON: Expecting"),
        (lambda folder: edit_config(folder, model_type="gpt2"), "hf: config.json has model_type='gpt2'"),
        (lambda folder: edit_config(folder, hidden_size=64), r"model\.hidden_dim: 64 there, 32 here"),
        (add_bias, r"model\.layers\.0\.mlp\.up_proj\.bias: \[48\] there, missing here"),
        (lose_a_layer, r"model\.layers\.1\.mlp\.up_proj\.weight: missing there, \[48, 32\] here"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named_before_anything_is_loaded(
    damage: Callable[[Path], object], words: str, source: Source, tmp_path: Path
) -> None:
    damage(shutil.copytree(source.hf, tmp_path / "hf"))
    config = started(source, tmp_path, InitFrom(source=str(tmp_path / "hf")))
    with pytest.raises(ValueError, match=words):
        check(config)
    assert not Path(config.output_path).exists()


def test_weights_that_are_not_finite_are_refused(source: Source, tmp_path: Path) -> None:
    folder = shutil.copytree(source.hf, tmp_path / "hf")
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill(np.nan))
    with pytest.raises(ValueError, match=r"hf: blocks\.mlp\.up is not finite, and no training goes on from there"):
        GrugRunner(started(source, tmp_path, InitFrom(source=str(folder)))).init_state()


def test_rows_of_padding_are_kept_and_said(source: Source, tmp_path: Path) -> None:
    folder = shutil.copytree(source.hf, tmp_path / "hf")

    def pad(tensors: dict[str, np.ndarray]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = np.pad(tensors[name], ((0, 20), (0, 0)))

    edit_tensors(folder, pad)
    edit_config(folder, vocab_size=320)
    asked = started(source, tmp_path, InitFrom(source=str(folder)))
    with pytest.raises(ValueError, match=r"embed: \[320, 32\] there, \[300, 32\] here"):
        check(asked)
    padded = replace(asked, model=replace(SMALL_MODEL, vocab_size=320))
    assert "20 rows of its vocabulary are beyond the 300 tokens of the tokenizer, and are kept" in check(padded)


def test_a_damaged_checkpoint_is_no_source_and_stays_as_it_is(source: Source, tmp_path: Path) -> None:
    run = shutil.copytree(source.run, tmp_path / "run")
    config = started(source, tmp_path, InitFrom(source=str(run)))
    for file in sorted((run / "checkpoints" / "step-40" / "params").rglob("*")):
        if file.is_file() and file.stat().st_size > 1000:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="step-40"):
        GrugRunner(config).init_state()
    (run / "checkpoints" / "step-40" / "grug_checkpoint.json").write_text("{")
    with pytest.raises(DamagedCheckpointError, match=r"grug_checkpoint\.json cannot be read"):
        check(config)
    with pytest.raises(ValueError, match="no checkpoint of step 7: there are 40, 1"):
        check(started(source, tmp_path, InitFrom(source=str(run), step=7)))
    assert not Path(config.output_path).exists() and (run / "checkpoints" / "step-40").is_dir()


def test_a_variant_starts_from_its_own_runs_and_not_from_llamas(source: Source, tmp_path: Path) -> None:
    variant = ModdedConfig(vocab_size=300, hidden_dim=32, num_layers=2, num_heads=4, max_seq_len=32, tied=True)
    first = replace(source.config, model=variant, output_path=str(tmp_path / "first"))
    first = replace(first, trainer=replace(first.trainer, ema_beta=None))
    runner = GrugRunner(first)
    state = runner.init_state()
    runner.save(state)
    asked = replace(first.trainer, seed=9, init_from=InitFrom(source=first.output_path))
    second = GrugRunner(replace(first, trainer=asked, output_path=str(tmp_path / "second"))).init_state()
    assert equal(second.params, state.params)
    with pytest.raises(ValueError, match=r"keeps no moving average: leave trainer\.init_from\.ema out"):
        check(replace(first, trainer=replace(asked, init_from=InitFrom(source=first.output_path, ema=True))))
    with pytest.raises(ValueError, match="modded:ModdedConfig has no form in Hugging Face's libraries"):
        check(started(source, tmp_path, InitFrom(source=str(source.hf)), model=variant))
    with pytest.raises(ValueError, match=r"pairs\.local\.attn\.wk: missing there"):
        check(started(source, tmp_path, InitFrom(source=str(source.run)), model=variant))
    with pytest.raises(ValueError, match="is no run, and has neither steps nor a moving average"):
        check(started(source, tmp_path, InitFrom(source=str(source.hf), step=3)))


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_texts_of_one_s_own_go_on_where_the_model_is(
    kind: str, source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(make_text(7, 30_000))
    asked = InitFrom(source=str(source.run if kind == "run" else source.hf))
    with caplog.at_level(logging.INFO):
        config = text_run(tmp_path / "texts", runs=tmp_path / "runs", init_from=asked)
    assert isinstance(config.model, GrugModelConfig) and isinstance(config.optimizer, AdamWConfig)
    assert replace(config.model, head_dim=None) == SMALL_MODEL
    assert config.data.tokenizer == (source.config.data.tokenizer if kind == "run" else str(source.hf))
    assert config.optimizer.learning_rate == pytest.approx(3e-4)
    assert "learning rate 3e-04: 0.1 of AdamW's usual one, at which trained weights would lose" in caplog.text
    if kind == "hf":
        runner = GrugRunner(config)
        _, metrics = runner.train_step(runner.init_state(), runner.batch(0))
        assert float(metrics.loss) < CHANCE - 1
