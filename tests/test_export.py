import errno
import json
import resource
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import equinox as eqx
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from experiments.variants.modded import ModdedConfig
from grug_native.checkpoint.leaves import named_leaves
from grug_native.cli.main import main
from grug_native.components import RunParts
from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig
from grug_native.data.vocabulary import write_tokenizer
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.export import export_checkpoint
from grug_native.host.process import code_commit
from grug_native.host.signals import ExitCode
from grug_native.language_model import abstract_parameters, hf_form
from grug_native.optimizer import AdamWConfig
from grug_native.runner import GrugRunner
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import MeshAxes
from grug_native.weights.hf_export import write_hf_folder
from grug_native.weights.hf_tensors import tensors_of
from grug_native.weights.safetensors_io import INDEX_FILE
from tests.fixtures_run import SMALL_MODEL, llama

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig

type Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runner(small_corpus: "LmDataConfig", tmp_path_factory: pytest.TempPathFactory) -> GrugRunner:
    """A run that has been trained, on four devices."""
    runner = GrugRunner(
        GrugNativeRunConfig(
            model=SMALL_MODEL,
            data=small_corpus,
            optimizer=AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=1)),
            trainer=GrugTrainerConfig(
                num_train_steps=3, train_batch_size=4, ema_beta=0.5, mesh=MeshAxes(data=2, model=2)
            ),
            eval=GrugEvalConfig(max_eval_batches=1, eval_ema=False),
            output_path=str(tmp_path_factory.mktemp("export") / "run"),
        )
    )
    runner.fit()
    return runner


def parts_of(config: GrugNativeRunConfig) -> RunParts:
    return RunParts(config, GrugRunner(config).optimizer)


def test_a_checkpoint_as_others_read_it(runner: GrugRunner, tmp_path: Path, capsys: Capture) -> None:
    output, run = tmp_path / "llama", runner.config.output_path
    assert main(["export", run, "--output", str(output), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    tensors, state = load_file(output / "model.safetensors"), runner.restore()
    params = llama(state.params)
    assert len(tensors) == 3 + 9 * SMALL_MODEL.num_layers
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params.embed)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params.head.T)
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.weight"], params.blocks.attn.wk[1].T)
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], params.blocks.mlp.down[0].T)
    np.testing.assert_array_equal(tensors["model.layers.0.input_layernorm.weight"], params.blocks.attn_norm.weight[0])
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == "float32"
    assert (config["eos_token_id"], config["bos_token_id"]) == (0, None)
    assert json.loads((output / "generation_config.json").read_text()) == {
        "_from_model_config": True,
        "eos_token_id": 0,
    }
    for file in Path(runner.config.data.tokenizer).iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_the_card_says_what_is_known(runner: GrugRunner, tmp_path: Path) -> None:
    card = (export_checkpoint(parts_of(runner.config), tmp_path / "a") / "README.md").read_text()
    assert "# run\n" in card and "3 steps and 384 tokens old" in card and "in bfloat16" in card
    assert "| caves | train 9 documents" in card and "bits per byte.\n" in card
    assert f"commit {code_commit()}" in card and "jax 0." in card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config["model"]["hidden_dim"] == 32
    # Where things lie on this machine is nobody's business.
    assert str(Path(runner.config.output_path).parent) not in card and str(runner.config.data.cache_dir) not in card
    averaged = (runner.export(runner.restore(), tmp_path / "b", ema=True) / "README.md").read_text()
    assert "the moving average of its parameters" in averaged


def test_a_state_on_many_devices_is_what_its_checkpoint_is(runner: GrugRunner, tmp_path: Path) -> None:
    for ema in (False, True):
        one = runner.export(runner.restore(), tmp_path / f"state-{ema}", ema=ema)
        other = export_checkpoint(parts_of(runner.config), tmp_path / f"saved-{ema}", ema=ema)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
    plain = (tmp_path / "saved-False" / "model.safetensors").read_bytes()
    assert plain != (tmp_path / "saved-True" / "model.safetensors").read_bytes()


def test_a_tied_head_is_written_once_and_large_models_in_parts(tmp_path: Path) -> None:
    config = replace(SMALL_MODEL, tie_embeddings=True)
    params, form = abstract_parameters(config), hf_form(config)
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    write_hf_folder(
        tmp_path / "tied",
        form.config,
        tensors_of(form, params),
        lambda name: np.zeros(shapes[name], np.float32),
        dtype="float32",
        card="",
        write_tokenizer=lambda folder: None,
        shard_bytes=40_000,
    )
    index = json.loads((tmp_path / "tied" / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) == 3 and "lm_head.weight" not in index["weight_map"]
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True


def test_nothing_is_written_where_something_is_or_what_has_no_form(runner: GrugRunner, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    run = runner.config.output_path
    for output, words in (
        (str(tmp_path / "here"), "here' exists, and is left as it is: give a new folder"),
        (str(tmp_path / "no" / "where"), "there is no folder"),
        ("s3://bucket/a", "must be a folder of this machine"),
    ):
        with pytest.raises(ValueError, match=words):
            export_checkpoint(parts_of(runner.config), output)
    assert main(["export", run, "--output", str(tmp_path / "a"), "--step", "9"]) == ExitCode.REFUSED
    variant = ModdedConfig(vocab_size=300, hidden_dim=32, num_layers=2, num_heads=4, max_seq_len=32)
    with pytest.raises(ValueError, match="modded:ModdedConfig has no form in Hugging Face's libraries"):
        export_checkpoint(parts_of(replace(runner.config, model=variant)), tmp_path / "a")
    state = runner.restore()
    with pytest.raises(ValueError, match="keeps no moving average"):
        runner.export(eqx.tree_at(lambda s: s.ema_params, state, None), tmp_path / "a", ema=True)
    wq = llama(state.params).blocks.attn.wq
    sick = eqx.tree_at(lambda s: llama(s.params).blocks.attn.wq, state, wq * np.nan)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is not finite"):
        runner.export(sick, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@contextmanager
def largest_file(size: int) -> Generator[None]:
    """No file of this process may grow larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_of_an_export_that_finds_no_room_nothing_is_left(runner: GrugRunner, tmp_path: Path) -> None:
    parts = parts_of(runner.config)
    _ = parts.tokenizer, parts.state_shape
    with (
        largest_file(50_000),
        pytest.raises(OSError, match=r"cannot be written .*what was written of it is removed; make room") as error,
    ):
        export_checkpoint(parts, tmp_path / "a")
    assert error.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []
    export_checkpoint(parts, tmp_path / "a")


def test_a_tokenizer_of_a_hub_is_written_anew(small_corpus: "LmDataConfig", tmp_path: Path) -> None:
    from levanter.tokenizers import HfMarinTokenizer, load_tokenizer

    own = small_corpus.the_tokenizer
    assert isinstance(own, HfMarinTokenizer)
    write_tokenizer(replace(own, _name_or_path="somebody/tokenizer"), tmp_path)
    read = load_tokenizer(str(tmp_path))
    assert (read.get_vocab(), read.eos_token_id, read.bos_token) == (own.get_vocab(), own.eos_token_id, None)
    assert read.encode("grug say 日本") == own.encode("grug say 日本")
