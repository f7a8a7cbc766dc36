import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from levanter.data.text.datasets import ConcatDatasetComponent, DatasetComponent, LmDataConfig
from levanter.data.text.formats import PrebuiltLmDatasetFormat
from levanter.store.cache import CacheLedger, CacheMetadata, SerialCacheWriter

from grug_native.data.cache import build_train_caches, data_fingerprint, spaces_before_eos, verify_caches
from grug_native.data.corpus import local_text_data
from grug_native.data.vocabulary import VOCABULARY_RECORD
from tests.fixtures_data import make_text


@pytest.fixture
def corpus_copy(small_corpus: LmDataConfig, tmp_path: Path) -> LmDataConfig:
    """A corpus that may be damaged."""
    root = shutil.copytree(Path(str(small_corpus.cache_dir)).parent, tmp_path / "corpus")
    return replace(small_corpus, cache_dir=str(root / "cache"), tokenizer=str(root / "tokenizer"))


def _cache(cfg: LmDataConfig) -> Path:
    return Path(str(cfg.cache_dir)) / "clubs" / "train"


def _edit_ledger(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(cache: Path) -> None:
        file = cache / "shard_ledger.json"
        ledger = json.loads(file.read_text())
        change(ledger)
        file.write_text(json.dumps(ledger))

    return edit


def _write(field: str, index: int, value: int) -> Callable[[Path], None]:
    def write(cache: Path) -> None:
        spec = {"driver": "zarr3", "kvstore": f"file://{cache}/input_ids/{field}"}
        ts.open(spec, open=True).result()[index].write(value).result()

    return write


def _cut(name: str, keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def cut(cache: Path) -> None:
        (cache / name).write_bytes(keep((cache / name).read_bytes()))

    return cut


def _remove(name: str) -> Callable[[Path], None]:
    return lambda cache: (cache / name).unlink()


_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "ledger gone": (_remove("shard_ledger.json"), r"shard_ledger\.json"),
    "ledger emptied": (_cut("shard_ledger.json", lambda _: b""), r"clubs/train"),
    "build unfinished": (_edit_ledger(lambda ledger: ledger.update(is_finished=False)), "never finished"),
    "data shard gone": (_remove("input_ids/data/c/0"), r"input_ids/data/c/0.* is missing"),
    "data shard emptied": (_cut("input_ids/data/c/0", lambda _: b""), r"input_ids/data/c/0"),
    "data shard cut in half": (_cut("input_ids/data/c/0", lambda b: b[: len(b) // 2]), r"input_ids/data/c/0"),
    "data shard cut by a byte": (_cut("input_ids/data/c/0", lambda b: b[:-1]), r"input_ids/data/c/0"),
    "offsets gone": (_remove("input_ids/offsets/c/0"), r"input_ids/offsets/c/0.* is missing"),
    "offsets cut": (_cut("input_ids/offsets/c/0", lambda b: b[:-7]), r"input_ids/offsets/c/0"),
    "metadata gone": (_remove("input_ids/data/zarr.json"), r"input_ids/data/zarr\.json"),
    "metadata emptied": (_cut("input_ids/offsets/zarr.json", lambda _: b""), r"input_ids/offsets/zarr\.json"),
    "killed before the rows were exposed": (_write("offsets", 0, 0), r"holds 0 rows .* the ledger says"),
    "a row less": (
        _edit_ledger(lambda ledger: ledger.update(total_num_rows=ledger["total_num_rows"] - 1)),
        "the ledger says",
    ),
    "other vocabulary": (
        _edit_ledger(lambda ledger: ledger["metadata"]["preprocessor_metadata"].update(vocab_size=301)),
        "vocab_size=301.* wants 300",
    ),
}


@pytest.mark.parametrize("name", _DAMAGES)
def test_a_damaged_cache_is_named(corpus_copy: LmDataConfig, name: str) -> None:
    damage, message = _DAMAGES[name]
    verify_caches(corpus_copy)
    damage(_cache(corpus_copy))
    with pytest.raises(ValueError, match=r"component 'clubs', train split: the token cache") as caught:
        verify_caches(corpus_copy)
    assert caught.match(message)
    assert str(_cache(corpus_copy)) in str(caught.value)
    verify_caches(replace(corpus_copy, train_weights={"caves": 1.0}), splits=("validation",))


def test_the_way_out_of_a_damaged_cache_is_one(corpus_copy: LmDataConfig, text_folder: Path) -> None:
    corpus = _cache(corpus_copy).parents[2]
    shutil.rmtree(_cache(corpus_copy))
    with pytest.raises(ValueError, match=rf"Delete the folder of its corpus, {corpus}, to have"):
        verify_caches(corpus_copy)


def test_a_cache_that_is_elsewhere_is_not_called_damaged(corpus_copy: LmDataConfig) -> None:
    corpus = _cache(corpus_copy).parents[2]
    corpus.rename(corpus.with_name("elsewhere"))
    tokenizer = corpus_copy.tokenizer.replace("/corpus/", "/elsewhere/")
    with pytest.raises(ValueError, match=r"there is no token cache .*give its place in data\.cache_dir") as caught:
        verify_caches(replace(corpus_copy, tokenizer=tokenizer))
    assert "damaged" not in str(caught.value) and "set data.auto_build_caches=true" in str(caught.value)


def test_a_cache_that_levanter_will_build_is_passed_over(corpus_copy: LmDataConfig) -> None:
    shutil.rmtree(_cache(corpus_copy))
    with pytest.raises(ValueError, match=r"there is no token cache"):
        verify_caches(corpus_copy)
    verify_caches(replace(corpus_copy, auto_build_caches=True))


def test_validation_text_without_its_cache_is_an_error(corpus_copy: LmDataConfig) -> None:
    shutil.rmtree(_cache(corpus_copy).parent / "validation")
    with pytest.raises(ValueError, match="component 'clubs', validation split"):
        verify_caches(corpus_copy)


def _write_shards(root: Path, rows: list[list[int]]) -> None:
    """A cache in levanter's sharded layout, a shard for each row."""
    ledger = CacheLedger(total_num_rows=0, shard_rows={}, is_finished=True, layout="sharded")
    for number, row in enumerate(rows):
        name = f"part-{number}"
        item = {"input_ids": np.asarray(row, np.int32)}
        with SerialCacheWriter(str(root / name), item, CacheMetadata({}), shard_name=name) as writer:
            writer.write_batch([item])
        ledger.finished_shards.append(name)
        ledger.shard_rows[name] = 1
        ledger.field_counts_by_shard[name] = {"input_ids": len(row)}
        ledger.total_num_rows += 1
    ledger.field_counts = {"input_ids": sum(map(len, rows))}
    (root / "shard_ledger.json").write_text(json.dumps(asdict(ledger)))


def test_shards_and_concatenated_parts_are_verified_one_by_one(tmp_path: Path) -> None:
    for part in ("left", "right"):
        _write_shards(tmp_path / part / "train", [[1, 2, 3], [4, 5]])
    children = {
        part: DatasetComponent(cache_dir=str(tmp_path / part), format=PrebuiltLmDatasetFormat())
        for part in ("left", "right")
    }
    cfg = LmDataConfig(
        tokenizer="passthrough", vocab_size=10, cache_dir=None, components={"both": ConcatDatasetComponent(children)}
    )
    verify_caches(cfg)
    assert sorted(data_fingerprint(cfg)) == ["component/both/left", "component/both/right", "config", "tokenizer"]
    (tmp_path / "right" / "train" / "part-1" / "input_ids" / "data" / "c" / "0").unlink()
    with pytest.raises(ValueError, match=r"component 'both/right', train split: .*part-1/input_ids/data/c/0"):
        verify_caches(cfg)


def test_a_damaged_shard_among_many_is_named_every_time(tmp_path: Path) -> None:
    _write_shards(tmp_path / "train", [[1, 2, 3]] * 8)
    component = DatasetComponent(cache_dir=str(tmp_path), format=PrebuiltLmDatasetFormat())
    cfg = LmDataConfig(tokenizer="passthrough", vocab_size=10, cache_dir=None, components={"a": component})
    (tmp_path / "train" / "part-0" / "input_ids" / "offsets" / "zarr.json").write_bytes(b"")
    for _ in range(100):
        with pytest.raises(ValueError, match=r"part-0/input_ids/offsets/zarr\.json"):
            verify_caches(cfg)


def test_caches_of_an_older_corpus_are_read_and_named(
    small_corpus: LmDataConfig, older_corpus: LmDataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        verify_caches(small_corpus)
        assert not caplog.messages
        verify_caches(older_corpus)
    [said] = caplog.messages  # once, for all of its caches
    assert str(Path(str(older_corpus.cache_dir)).parent) in said
    assert "a space that its text does not have" in said
    for split in ("train", "validation"):
        assert spaces_before_eos(older_corpus, "caves", split)
        assert not spaces_before_eos(small_corpus, "caves", split)
    assert data_fingerprint(older_corpus) != data_fingerprint(small_corpus)


def test_spaces_are_only_in_the_texts_of_levanter(older_corpus: LmDataConfig) -> None:
    caves = older_corpus.components["caves"]
    assert isinstance(caves, DatasetComponent)
    caves = replace(caves, cache_dir=f"{older_corpus.cache_dir}/caves")
    for component, spaces in (
        (ConcatDatasetComponent(children={"caves": caves}), True),
        (replace(caves, format=PrebuiltLmDatasetFormat()), False),
        (replace(caves, cache_dir=f"{older_corpus.cache_dir}/none"), False),
    ):
        data = replace(older_corpus, components={"one": component}, train_weights=None)
        assert spaces_before_eos(data, "one", "train") == spaces


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> str:
    """As many tokens as in the small corpus, which mean other words."""
    (tmp_path / "other.txt").write_text(make_text(3, 400).upper())
    cfg = local_text_data({"other": tmp_path / "other.txt"}, cache_dir=tmp_path / "other", vocab_size=300)
    return cfg.tokenizer


def test_a_cache_of_another_tokenizer_is_refused(corpus_copy: LmDataConfig, other_tokenizer: str) -> None:
    wrong = replace(corpus_copy, tokenizer=other_tokenizer)
    match = r"component 'caves', train split: the token cache .* was made by another tokenizer than data\.tokenizer="
    with pytest.raises(ValueError, match=match) as caught:
        verify_caches(wrong)
    assert "damaged" not in str(caught.value) and other_tokenizer in str(caught.value)
    for split in ("train", "validation"):
        for name in ("caves", "clubs"):
            (Path(str(corpus_copy.cache_dir)) / name / split / VOCABULARY_RECORD).unlink()
    verify_caches(corpus_copy)
    with pytest.raises(ValueError, match=match):  # The tokenizer whose name the ledger records says so too.
        verify_caches(wrong)


def test_a_copy_of_the_tokenizer_is_the_same_tokenizer(corpus_copy: LmDataConfig, tmp_path: Path) -> None:
    copied = shutil.copytree(corpus_copy.tokenizer, tmp_path / "copied")
    file = copied / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    verify_caches(replace(corpus_copy, tokenizer=str(copied)))


def test_a_tokenizer_that_cannot_be_compared_is_named_once(
    older_corpus: LmDataConfig, tmp_path: Path, other_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = shutil.copytree(str(older_corpus.cache_dir), tmp_path / "cache")  # No corpus is around it.
    gone = _edit_ledger(lambda ledger: ledger["metadata"]["preprocessor_metadata"].update(tokenizer="/gone"))
    for name in ("caves", "clubs"):
        for split in ("train", "validation"):
            gone(cache / name / split)
    verify_caches(replace(older_corpus, cache_dir=str(cache), tokenizer=other_tokenizer))
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("grug_native")]
    assert "caves (train), clubs (train), caves (validation), clubs (validation)" in said and other_tokenizer in said


def test_a_cache_that_levanter_builds_is_recorded(corpus_copy: LmDataConfig, other_tokenizer: str) -> None:
    built = replace(corpus_copy, auto_build_caches=True)
    shutil.rmtree(_cache(corpus_copy))
    build_train_caches(built)
    assert (_cache(corpus_copy) / VOCABULARY_RECORD).exists()
    _edit_ledger(lambda ledger: ledger["metadata"]["preprocessor_metadata"].update(tokenizer=other_tokenizer))(
        _cache(corpus_copy)
    )  # As if other tokens had been written there since, under the same name.
    verify_caches(built)
    with pytest.raises(ValueError, match="was made by another tokenizer"):
        verify_caches(replace(built, tokenizer=other_tokenizer))


def test_a_cache_needs_a_place() -> None:
    cfg = LmDataConfig(components={"x": DatasetComponent()}, cache_dir=None)
    with pytest.raises(ValueError, match=r"component 'x' has no place .* data\.cache_dir"):
        verify_caches(cfg)


def test_fingerprint_does_not_know_where_the_data_are(small_corpus: LmDataConfig, corpus_copy: LmDataConfig) -> None:
    first = data_fingerprint(small_corpus)
    assert sorted(first) == ["component/caves", "component/clubs", "config", "tokenizer"]
    assert data_fingerprint(corpus_copy) == first


def test_fingerprint_tells_tokens_apart(small_corpus: LmDataConfig, corpus_copy: LmDataConfig) -> None:
    _write("data", 40, 7)(_cache(corpus_copy))
    first, second = data_fingerprint(small_corpus), data_fingerprint(corpus_copy)
    assert {name for name in first if first[name] != second[name]} == {"component/clubs"}


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"mixture_block_size": 16}, True),
        ({"shuffle": False}, True),
        ({"train_weights": [(0, {"caves": 1.0}), (8, {"clubs": 1.0})]}, True),
        ({"block_cross_document_attention": False}, True),
        ({"auto_build_caches": True}, False),
    ],
)
def test_fingerprint_of_the_config_covers_what_changes_batches(
    small_corpus: LmDataConfig, changes: dict[str, Any], differs: bool
) -> None:
    first, second = data_fingerprint(small_corpus), data_fingerprint(replace(small_corpus, **changes))
    assert {name for name in first if first[name] != second[name]} == ({"config"} if differs else set())


def test_fingerprint_of_the_config_knows_the_order_of_components(small_corpus: LmDataConfig) -> None:
    turned = replace(small_corpus, components=dict(reversed(small_corpus.components.items())))
    assert data_fingerprint(turned)["config"] != data_fingerprint(small_corpus)["config"]


def test_fingerprint_of_the_tokenizer(small_corpus: LmDataConfig, corpus_copy: LmDataConfig) -> None:
    (Path(corpus_copy.tokenizer) / "tokenizer.json").write_text(
        (Path(small_corpus.tokenizer) / "tokenizer.json").read_text() + "\n"
    )
    assert data_fingerprint(corpus_copy)["tokenizer"] != data_fingerprint(small_corpus)["tokenizer"]
