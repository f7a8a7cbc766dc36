from dataclasses import replace
from pathlib import Path

import jax
import pytest

from grug_native.components import RunParts, load_tokenizer
from grug_native.optimizer import GrugOptimizer
from grug_native.sharding import MeshAxes
from tests.fixtures_run import SMALL_MODEL, MakeRun


def parts_of(make_run: MakeRun, **changes: object) -> RunParts:
    config = make_run(**changes)
    return RunParts(config, GrugOptimizer(config.optimizer, config.trainer.num_train_steps))


def test_the_abstract_state_is_the_drawn_one(make_run: MakeRun) -> None:
    parts = parts_of(make_run, trainer={"ema_beta": 0.5}, optimizer={"type": "muon"})
    drawn, abstract = parts.init_state(), parts.state_shape
    assert jax.tree.structure(drawn) == jax.tree.structure(abstract)
    for real, shape in zip(jax.tree.leaves(drawn), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (shape.shape, shape.dtype)
        assert real.sharding.is_equivalent_to(shape.sharding, real.ndim)


def test_parts_are_made_once(make_run: MakeRun) -> None:
    parts = parts_of(make_run)
    assert parts.mesh is parts.mesh
    assert parts.loader is parts.loader
    assert parts.evaluation is parts.evaluation is not None


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(make_run: MakeRun) -> None:
    parts = parts_of(make_run, model=replace(SMALL_MODEL, vocab_size=256))
    with pytest.raises(
        ValueError, match=r"model.vocab_size=256 is smaller than the 300 tokens .* raise it to at least 300"
    ):
        _ = parts.dataset


def test_a_sequence_longer_than_the_data_is_refused(make_run: MakeRun) -> None:
    parts = parts_of(make_run, model=replace(SMALL_MODEL, max_seq_len=1_000_000))
    with pytest.raises(ValueError, match=r"less than one sequence of 1000000"):
        _ = parts.dataset


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"train_batch_size": 6}}, "train_batch_size=6 does not divide over 4"),
        ({"trainer": {"train_batch_size": 8, "microbatch_size": 2}}, "microbatch_size=2 does not divide over 4"),
        ({"trainer": {"mesh": MeshAxes(data=3)}}, "does not fit 4 device"),
        ({"model": replace(SMALL_MODEL, hidden_dim=30, head_dim=8)}, "model.hidden_dim=30 does not divide over the 4"),
        ({"trainer": {"mesh": MeshAxes(model=4)}}, "model.num_kv_heads=2 does not divide over the 4"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(make_run: MakeRun, changes: dict[str, object], words: str) -> None:
    parts = parts_of(make_run, **changes)
    with pytest.raises(ValueError, match=words):
        _ = parts.state_shape


@pytest.mark.parametrize("name", ["/nowhere/tokenizer", "./tokenizer", "runs/corpora/gone/tokenizer"])
def test_a_tokenizer_that_did_not_move_along_is_named(make_run: MakeRun, name: str) -> None:
    data = replace(make_run().data, tokenizer=name)
    with pytest.raises(ValueError, match=rf"data\.tokenizer='{name}' is no folder here"):
        load_tokenizer(data)
    assert not Path(name).exists()


@pytest.mark.parametrize("text", ['{"model', "{}"])
def test_a_damaged_tokenizer_is_named(text: str, make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=rf"data\.tokenizer='{tmp_path}' holds no tokenizer that can be read"):
        load_tokenizer(replace(make_run().data, tokenizer=str(tmp_path)))
