"""F16 to F18, F25, F33, F34: a run resumed as another, with other data, elsewhere, from further back, or twice."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorstore as ts
import yaml

from grug_native.tracking.jsonl import METRICS_FILE, read_metrics
from tests.faults.runs import ForkServer, Run
from tests.fixtures_run import SMALL_MODEL
from tests.tolerance import assert_close, loss_terms

CHANGES: dict[str, tuple[Any, str, str]] = {
    "model.intermediate_dim": (64, "48", "64"),
    "optimizer.beta2": (0.5, "0.95", "0.5"),
    "optimizer.learning_rate": (0.5, "0.01", "0.5"),
    "trainer.ema_beta": (0.9, "null", "0.9"),
    "trainer.num_train_steps": (9, "8", "9"),
    "trainer.seed": (1, "0", "1"),
    "trainer.train_batch_size": (8, "4", "8"),
}


def test_f16_a_changed_setting_is_refused(half: Run) -> None:
    half.edit({name: value for name, (value, _, _) in CHANGES.items()} | {"trainer.run_id": "other"})
    before = half.names()
    said = half.fit().expect(2, "trainer.allow_changes=[", "run_id: stored run, wanted other")
    for name, (_, old, new) in CHANGES.items():
        assert f"{name}: stored {old}, wanted {new}" in said
    assert half.names() == before


def test_f16_an_allowed_change_is_made_and_remembered(half: Run, whole: Run) -> None:
    half.edit({"optimizer.learning_rate": 0.5})
    half.fit().expect(2, "'--trainer.allow_changes=[optimizer.learning_rate]'")
    half.edit({"trainer.allow_changes": ["optimizer.learning_rate"]}).fit().expect(0)
    assert half.metadata(8).lineage == ("step 5: optimizer.learning_rate: stored 0.01, wanted 0.5",)
    assert half.record()[:5] == whole.record()[:5] and half.record()[5:] != whole.record()[5:]
    half.fit().expect(0)
    written = yaml.safe_load((half.folder / "config.yaml").read_text())
    assert (written["optimizer"]["learning_rate"], written["trainer"]["allow_changes"]) == (0.5, [])


def test_f16_another_batch_size_must_keep_the_place_in_the_data(half: Run) -> None:
    half.edit({"trainer.train_batch_size": 8, "trainer.allow_changes": ["trainer.train_batch_size"]})
    half.fit().expect(2, "step 5 was saved after 20 sequences", "it would come after 40", "((0, ...), (5, ...))")
    half.edit({"trainer.train_batch_size": [[0, 4], [5, 8]]}).fit().expect(0)
    assert half.metadata(8).data_offset == 44


def test_f16_what_changes_no_result_may_change(half: Run, whole: Run) -> None:
    changes = {
        "prefetch": 1,
        "steps_per_checkpoint": 3,
        "minutes_per_temporary_checkpoint": 5.0,
        "max_skipped_steps": 3,
    }
    half.edit({f"trainer.{name}": value for name, value in changes.items()} | {"eval.max_eval_batches": 2})
    half.fit().expect(0)
    half.expect_equal(whole)


def test_f16_a_batch_may_be_made_in_parts(half: Run, whole: Run) -> None:
    half.edit({"trainer.microbatch_size": 2}).fit().expect(0)
    for (step, loss, *rest), (wanted_step, wanted_loss, *wanted) in zip(half.record(), whole.record(), strict=True):
        assert (step, rest[2]) == (wanted_step, wanted[2]), "another batch"
        assert float.fromhex(str(loss)) == pytest.approx(float.fromhex(str(wanted_loss)), rel=1e-5)


def write_tokens(cache: Path, value: int) -> None:
    spec = {"driver": "zarr3", "kvstore": f"file://{cache}/input_ids/data"}
    ts.open(spec, open=True).result()[:512].write(value).result()


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DATA_FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a shard is lost": (lambda cache: lose(cache / "input_ids/data/c/0"), ("component 'clubs'", "is missing")),
    "a shard is cut": (lambda cache: cut(cache / "input_ids/data/c/0"), ("component 'clubs'", "data/c/0")),
    "other tokens": (lambda cache: write_tokens(cache, 7), ("data_fingerprint: stored",)),
}


@pytest.fixture
def corpus(server: ForkServer, tmp_path: Path) -> Path:
    """A copy of the corpus that may be damaged."""
    return Path(shutil.copytree(server.corpus(), tmp_path / "corpus"))


def with_corpus(run: Run, corpus: Path) -> Run:
    data = yaml.safe_load(run.config.read_text())["data"]
    root = next(path for path in corpus.iterdir() if (path / "cache").is_dir()) if corpus.is_dir() else corpus
    assert Path(data["cache_dir"]).name == "cache" and Path(data["tokenizer"]).parent.name == root.name
    return run.edit({"data.cache_dir": str(root / "cache"), "data.tokenizer": str(root / "tokenizer")})


def clubs(run: Run) -> Path:
    return Path(yaml.safe_load(run.config.read_text())["data"]["cache_dir"]) / "clubs" / "train"


@pytest.mark.parametrize(("damage", "words"), DATA_FAULTS.values(), ids=DATA_FAULTS.keys())
def test_f17_other_data(damage: Callable[[Path], object], words: tuple[str, ...], half: Run, corpus: Path) -> None:
    damage(clubs(with_corpus(half, corpus)))
    before = half.names()
    half.fit().expect(2, *words)
    assert half.names() == before


def test_f17_components_in_another_order(half: Run) -> None:
    components = yaml.safe_load(half.config.read_text())["data"]["components"]
    half.edit({"data.components": dict(reversed(components.items()))}).fit().expect(2, "data_fingerprint: stored")


def test_f17_the_same_data_elsewhere(half: Run, corpus: Path, whole: Run) -> None:
    with_corpus(half, corpus).fit().expect(0)
    half.expect_equal(whole)


def test_f25_a_bad_token_id(run: Run, corpus: Path) -> None:
    write_tokens(clubs(with_corpus(run, corpus)), 300)
    run.fit().expect(2, "dataset 'clubs', row", "token id 300 is outside the vocabulary [0, 300)")


def test_f18_another_number_of_devices(half: Run, whole: Run) -> None:
    half.fit(devices=3).expect(2, "3")
    half.fit(devices=4, stop_after=7).expect(0)
    half.fit(devices=2).expect(0)
    rows, wanted = (read_metrics(run.folder / METRICS_FILE) for run in (half, whole))
    assert [row["data/batch_digest"] for row in rows] == [row["data/batch_digest"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert_close(row["train/loss"], other["train/loss"], terms=len(rows) * loss_terms(SMALL_MODEL, 4 * 32, 32))
    assert half.metadata(8).mesh == {"replica_dcn": 1, "data": 2, "expert": 1, "model": 1}


def test_f33_stepping_back(server: ForkServer, whole: Run, tmp_path: Path) -> None:
    run = server.copy(whole, tmp_path / "run")
    run.fit(resume_step=3).expect(2, "no checkpoint of step 3: there are 8, 6, 4, 2")
    changed = server.copy(run, tmp_path / "changed").edit({"trainer.seed": 5})
    changed.fit(resume_step=4).expect(2, "trainer.seed: stored 0, wanted 5")
    assert changed.names() == whole.names()
    damaged = server.copy(run, tmp_path / "damaged")
    (damaged.step(4) / "grug_checkpoint.json").unlink()
    damaged.fit(resume_step=4).expect(1, "grug_checkpoint.json cannot be read")
    assert damaged.names() == whole.names()
    run.fit(resume_step=4, stop_after=5).expect(0, f"resuming from {run.step(4)}")
    assert run.names() == [".abandoned-step-6", ".abandoned-step-8", "step-2", "step-4", "step-5"]
    assert [row[0] for row in run.record()] == [0, 1, 2, 3, 4]
    run.fit().expect(0)
    run.expect_equal(whole)
    run.fit(resume_step=0).expect(0, "starting from scratch")
    run.expect_equal(whole)


def test_f34_resuming_twice_at_step_0_and_when_all_is_done(run: Run, whole: Run) -> None:
    for stop in (0, 0, 3, 6, 8):
        run.fit(stop_after=stop).expect(0)
        assert run.steps[0] == stop
    run.expect_equal(whole)
    log, files = (run.folder / METRICS_FILE).read_bytes(), run.names()
    run.fit().expect(0)
    assert ((run.folder / METRICS_FILE).read_bytes(), run.names()) == (log, files)
