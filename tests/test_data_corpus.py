import json
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from levanter.data.text.cache import build_lm_dataset_cache
from levanter.data.text.datasets import LmDataConfig, UrlDatasetSourceConfig
from levanter.data.text.formats import TextLmDatasetFormat
from levanter.store.cache import TreeCache
from tokenizers import Tokenizer, pre_tokenizers

from grug_native.data import corpus_store
from grug_native.data.corpus import embedded_corpus, local_text_data
from grug_native.data.corpus_making import run_module, scratch_folder
from grug_native.data.corpus_store import EOS, SPLITS, read_counts
from grug_native.data.python_texts import docstrings, read_stdlib
from grug_native.data.text_survey import Split, hold_out
from tests.fixtures_data import make_text


def _source(cfg: LmDataConfig, domain: str) -> UrlDatasetSourceConfig:
    source = cfg.sources[domain]
    assert isinstance(source, UrlDatasetSourceConfig)
    return source


def _root(cfg: LmDataConfig) -> Path:
    return Path(str(cfg.cache_dir)).parent


def _cached(cfg: LmDataConfig, split: Split) -> dict[str, list[str]]:
    """The documents of each domain, decoded from its token cache, without their end."""
    return {name: _decode(cfg, cache) for name, cache in cfg.build_caches(split).items()}


def _decode(cfg: LmDataConfig, cache: TreeCache[dict[str, np.ndarray]]) -> list[str]:
    texts = [cfg.the_tokenizer.decode(row["input_ids"].tolist()) for row in cache.get_batch_sync(range(len(cache)))]
    assert all(text.endswith(EOS) for text in texts)
    return [text.removesuffix(EOS) for text in texts]


def test_every_kind_of_file_arrives_whole(tmp_path: Path) -> None:
    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "code" / "a.py").write_text("print('ä')\r\n")
    (tmp_path / "code" / "deep" / "b.md").write_text("\ufeff# title\n")
    (tmp_path / "code" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "code" / "e.TXT").write_text("LOUD\n")
    (tmp_path / "code" / ".hidden.txt").write_text("hidden")
    (tmp_path / "rows.jsonl").write_text('{"body": "first\\n日本"}\n\n{"body": ""}\n{"body": "second", "text": 3}\n')
    pq.write_table(pa.table({"body": ["third", "fourth"], "id": [1, 2]}), tmp_path / "rows.parquet")
    cfg = local_text_data(
        {"code": tmp_path / "code", "rows": [tmp_path / "rows.jsonl", str(tmp_path / "rows.parquet")]},
        cache_dir=tmp_path / "out",
        vocab_size=257,
        validation_fraction=0.0,
        text_key="body",
    )
    assert _cached(cfg, "train") == {
        "code": ["print('ä')\r\n", "# title\n", "LOUD\n"],
        "rows": ["first\n日本", "second", "third", "fourth"],
    }
    assert cfg.build_caches("validation") == {}


def test_splits_are_whole_documents_and_nothing_is_lost(small_corpus: LmDataConfig, text_folder: Path) -> None:
    train, held_out = _cached(small_corpus, "train"), _cached(small_corpus, "validation")
    counts = read_counts(_root(small_corpus))
    for domain in ("caves", "clubs"):
        documents = {file.read_text() for file in (text_folder / domain).iterdir()}
        assert set(train[domain]) | set(held_out[domain]) == documents
        assert len(train[domain]) + len(held_out[domain]) == len(documents)
        assert train[domain] and held_out[domain]
        assert counts[domain]["train"]["documents"] == len(train[domain])
        assert counts[domain]["train"]["bytes"] == sum(len(text.encode()) for text in train[domain])
    tokens = {name: cache.flat_field_length("input_ids") for name, cache in small_corpus.build_caches("train").items()}
    assert tokens == {name: count["train"]["tokens"] for name, count in counts.items()}


def test_one_big_file_is_split_by_position(tmp_path: Path) -> None:
    text = make_text(0, 2000)
    (tmp_path / "one.txt").write_text(text)
    cfg = local_text_data({"one": tmp_path / "one.txt"}, cache_dir=tmp_path / "out", vocab_size=257)
    [train], [held_out] = _cached(cfg, "train")["one"], _cached(cfg, "validation")["one"]
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.04 < len(held_out) / len(text) < 0.06


def test_caches_equal_those_that_levanter_builds_but_for_the_end(small_corpus: LmDataConfig, tmp_path: Path) -> None:
    ours, tokenizer = small_corpus.build_caches("train")["clubs"], small_corpus.the_tokenizer
    shards = _source(small_corpus, "clubs").get_shard_source("train")
    assert shards is not None
    theirs = build_lm_dataset_cache(str(tmp_path / "clubs" / "train"), shards, TextLmDatasetFormat(), tokenizer)
    assert ours.ledger.metadata == theirs.ledger.metadata
    rows = range(len(theirs))
    end, space = [tokenizer.eos_token_id], tokenizer.encode(" ")
    for mine, other in zip(ours.get_batch_sync(rows), theirs.get_batch_sync(rows), strict=True):
        text = mine["input_ids"].tolist()[:-1]
        assert mine["input_ids"].tolist() == [*text, *end]
        assert other["input_ids"].tolist() == [*text, *space, *end]
        assert mine["input_ids"].dtype == other["input_ids"].dtype


def test_texts_arrive_byte_for_byte(tmp_path: Path) -> None:
    texts = ["ends in a space ", f"about {EOS}, and {EOS}", EOS, "ends in a line\n", "grug", "🐕"]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cfg = local_text_data(
        {"all": tmp_path / "all.jsonl"}, cache_dir=tmp_path / "out", vocab_size=257, validation_fraction=0.0
    )
    assert _cached(cfg, "train")["all"] == texts
    rows = [row["input_ids"] for row in cfg.build_caches("train")["all"].get_batch_sync(range(len(texts)))]
    # With a vocabulary of bytes, tokens are bytes, and EOS is one more.
    assert [len(row) for row in rows] == [len(text.encode()) + 1 for text in texts]
    assert [(row == cfg.the_tokenizer.eos_token_id).sum() for row in rows] == [1] * len(texts)


def _small(folder: Path, out: Path, *, vocab_size: int = 280) -> LmDataConfig:
    return local_text_data({"clubs": folder}, cache_dir=out, vocab_size=vocab_size, validation_fraction=0.3)


def test_equal_inputs_find_the_same_corpus_and_others_make_another(tmp_path: Path, text_folder: Path) -> None:
    texts = shutil.copytree(text_folder / "clubs", tmp_path / "texts")
    out = tmp_path / "out"
    first = _small(texts, out)
    made = (_root(first) / "corpus.json").stat().st_mtime_ns
    assert _small(texts, out) == first
    assert (_root(first) / "corpus.json").stat().st_mtime_ns == made
    others = [_small(texts, out, vocab_size=290)]
    (texts / "extra.txt").write_text("more")
    others.append(_small(texts, out))
    assert len({_root(cfg) for cfg in [first, *others]}) == 3
    assert sorted(out.iterdir()) == sorted(_root(cfg) for cfg in [first, *others])


def test_the_tokenizer_of_a_run_that_was_deleted_is_made_anew(tmp_path: Path, text_folder: Path) -> None:
    first = _small(text_folder / "clubs", tmp_path / "out")
    file = Path(first.tokenizer) / "tokenizer.json"
    made = file.read_bytes()
    shutil.rmtree(_root(first))
    again = local_text_data(
        {"clubs": text_folder / "clubs"},
        cache_dir=tmp_path / "out",
        vocab_size=280,
        validation_fraction=0.3,
        keep_tokenizer=first.tokenizer,
    )
    assert again == first and file.read_bytes() == made


def test_a_corpus_is_made_of_its_inputs_alone(tmp_path: Path, text_folder: Path) -> None:
    moved = shutil.copytree(text_folder / "clubs", tmp_path / "elsewhere")
    first, second = _small(text_folder / "clubs", tmp_path / "a"), _small(moved, tmp_path / "b")
    assert _root(first).name == _root(second).name
    for file in sorted(file.relative_to(_root(first)) for file in _root(first).rglob("*") if file.is_file()):
        if file.name != "shard_ledger.json":  # which records where the tokenizer is
            assert (_root(first) / file).read_bytes() == (_root(second) / file).read_bytes(), file


def test_what_ends_the_making_leaves_nothing_behind(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_store, "_write_caches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _small(text_folder / "clubs", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert _cached(_small(text_folder / "clubs", tmp_path / "out"), "train")["clubs"]


def test_ctrl_c_has_what_is_half_made_removed(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, time
from pathlib import Path
from grug_native.host.process import end_at_ctrl_c
end_at_ctrl_c()
from grug_native.data.corpus_making import scratch_folder
with scratch_folder(Path({str(tmp_path)!r}), "0123456789abcdef") as folder:
    (folder / "half").mkdir()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(100)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_two_makers_at_once_end_with_one_corpus(tmp_path: Path, text_folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: _small(text_folder / "clubs", tmp_path / "out"), range(2)))
    assert both[0] == both[1]
    assert list((tmp_path / "out").iterdir()) == [_root(both[0])]


def test_a_given_tokenizer_is_used(tmp_path: Path, small_corpus: LmDataConfig, text_folder: Path) -> None:
    cfg = local_text_data(
        {"x": text_folder / "clubs"}, cache_dir=tmp_path, validation_fraction=0.0, tokenizer=small_corpus.tokenizer
    )
    assert cfg.tokenizer == small_corpus.tokenizer
    assert not (_root(cfg) / "tokenizer").exists()
    assert set(_cached(cfg, "train")["x"]) == {file.read_text() for file in (text_folder / "clubs").iterdir()}


def test_a_document_that_stands_there_often_is_taken_once(tmp_path: Path) -> None:
    rows = [make_text(0, 200)] * 3000 + [make_text(seed, 200) for seed in range(1, 101)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (tmp_path / "again.jsonl").write_text(f"{json.dumps({'text': rows[0]})}\n{json.dumps({'text': 'another'})}\n")
    cfg = local_text_data(
        {"rows": tmp_path / "rows.jsonl", "again": tmp_path / "again.jsonl"},
        cache_dir=tmp_path / "out",
        vocab_size=300,
        validation_fraction=0.05,
    )
    counts = read_counts(_root(cfg))
    train, held_out = counts["rows"]["train"], counts["rows"]["validation"]
    assert train["documents"] + held_out["documents"] == 101
    assert 0 < held_out["bytes"] / (train["bytes"] + held_out["bytes"]) <= 0.1
    assert counts["again"]["train"]["documents"] + counts["again"]["validation"]["documents"] <= 2
    texts = [text for split in SPLITS for found in _cached(cfg, split).values() for text in found]
    assert sorted(texts) == sorted(set(texts))
    files = json.loads((_root(cfg) / "sources.json").read_text())["files"]
    assert [(row["file"], row["domain"], row["repeated"]) for row in files] == [
        ("rows.jsonl", "rows", 2999),
        ("again.jsonl", "again", 1),
    ]


def test_the_split_is_by_bytes(tmp_path: Path) -> None:
    texts = [letter * 50 + str(number) for number in range(200) for letter in ("a", "日")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cfg = local_text_data({"x": tmp_path / "rows.jsonl"}, cache_dir=tmp_path / "out", vocab_size=257)
    counts = read_counts(_root(cfg))["x"]
    sizes = [counts[split]["bytes"] for split in SPLITS]
    assert sum(sizes) == sum(len(text.encode()) for text in texts)
    assert 0.05 <= sizes[1] / sum(sizes) < 0.06


@pytest.mark.parametrize("letters", ["abcdefgh", " ", "=-+", "日本語", "0123456789"])
def test_no_pretoken_is_long(tmp_path: Path, letters: str) -> None:
    line = "".join(random.Random(0).choices(letters, k=200_000))
    (tmp_path / "line.txt").write_text(line)
    cfg = local_text_data(
        {"x": tmp_path / "line.txt"}, cache_dir=tmp_path / "out", vocab_size=300, validation_fraction=0.0
    )
    assert _cached(cfg, "train")["x"] == [line]
    tokenizer = Tokenizer.from_file(str(_root(cfg) / "tokenizer" / "tokenizer.json"))
    assert tokenizer.pre_tokenizer is not None
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(line)
    assert max(end - start for _, (start, end) in pieces) <= 129  # with the space before it


def test_short_pretokens_are_those_of_gpt2(embedded_corpus_config: LmDataConfig) -> None:
    file = Path(embedded_corpus_config.tokenizer) / "tokenizer.json"
    ours = Tokenizer.from_file(str(file)).pre_tokenizer
    assert ours is not None
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in (make_text(0, 2000), "it's  12 o'clock\n\n\tdef f(x):   \n  pass  ", "don't ... €5 \u3000 ü "):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_what_a_killed_maker_left_is_swept_and_a_living_one_s_is_not(tmp_path: Path, text_folder: Path) -> None:
    out = tmp_path / "out"
    left, other = out / f".{'0' * 16}-abcd_123", out / ".notes"
    for folder in (left / "text", other):
        folder.mkdir(parents=True)
    with scratch_folder(out, "f" * 16) as living:
        cfg = _small(text_folder / "clubs", out)
        assert living.is_dir()
        assert not left.exists()
    assert sorted(out.iterdir()) == sorted([_root(cfg), other])
    # Also where the corpus is there already.
    left.mkdir()
    _small(text_folder / "clubs", out)
    assert not left.exists()


def test_a_module_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"trying failed: .*No module named grug_native\.none"):
        run_module(["grug_native.none"], "trying")


@given(
    sizes=st.dictionaries(st.text(min_size=1), st.integers(1, 1000), min_size=1, max_size=30),
    fraction=st.floats(0, 0.49),
)
def test_held_out_documents_stay_within_twice_the_fraction(sizes: dict[str, int], fraction: float) -> None:
    chosen = hold_out(sizes, fraction)
    total = sum(sizes.values())
    assert chosen <= sizes.keys()
    assert sum(sizes[name] for name in chosen) <= 2 * fraction * total
    assert chosen == hold_out(dict(reversed(sizes.items())), fraction)
    if all(size <= fraction * total for size in sizes.values()):
        assert sum(sizes[name] for name in chosen) >= fraction * total


_BAD_FILES: Mapping[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "is empty"),
    "picture.png": (b"\x89PNG", r"suffix '\.png'"),
    "latin.txt": (b"fine\nfine\ncaf\xe9 \n", r"latin\.txt, line 3: byte 0xe9 is not UTF-8"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin\.jsonl, line 2: byte 0xe9 is not UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl, line 2: not JSON"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl, line 1: there is no field 'text'; found list"),
    "other.jsonl": (
        b'{"text": "a"}\n{"body": "b"}\n',
        r"other\.jsonl, line 2: there is no field 'text'; found \['body'\]\. Rename what holds the text to 'text'",
    ),
    "number.jsonl": (b'{"text": 5}\n', r"number\.jsonl, line 1: the field 'text' is a number, not text"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', r"half\.jsonl, line 1: character 0 is half of a surrogate pair"),
    "blank.jsonl": (b"\n\n", "hold no text"),
    "garbage.parquet": (b"PAR1 no", r"garbage\.parquet: not a parquet file"),
}


@pytest.mark.parametrize("name", _BAD_FILES)
def test_a_bad_file_is_named(name: str, tmp_path: Path) -> None:
    content, message = _BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        local_text_data({"x": tmp_path / name}, cache_dir=tmp_path / "out")


def test_missing_paths_fields_and_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"body": ["a"], "text": pa.array([None], pa.string())}), tmp_path / "rows.parquet")
    for path, key, message in (
        (tmp_path / "nowhere.txt", "text", r"nowhere\.txt does not exist"),
        (tmp_path / "folder", "text", "folder holds no file with text in it and a known suffix"),
        (tmp_path / "rows.parquet", "content", r"no column 'content'; found \['body', 'text'\]"),
        (tmp_path / "rows.parquet", "text", "x: its files hold no text"),
    ):
        with pytest.raises(ValueError, match=message):
            local_text_data({"x": path}, cache_dir=tmp_path / "out", text_key=key)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    good = {"x": tmp_path / "a.txt"}
    with pytest.raises(ValueError, match="paths is empty"):
        local_text_data({}, cache_dir=tmp_path)
    for name in ("../up", "a//b", "a/train", "", "a b"):
        with pytest.raises(ValueError, match="a domain cannot be named"):
            local_text_data({name: tmp_path / "a.txt"}, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"weights names \['y'\]"):
        local_text_data(good, cache_dir=tmp_path, weights=[(0, {"x": 1.0}), (4, {"y": 1.0})])
    with pytest.raises(ValueError, match="vocab_size=256"):
        local_text_data(good, cache_dir=tmp_path, vocab_size=256)
    with pytest.raises(ValueError, match=r"validation_fraction=0\.5"):
        local_text_data(good, cache_dir=tmp_path, validation_fraction=0.5)
    with pytest.raises(ValueError, match="too few to split"):
        local_text_data(good, cache_dir=tmp_path)


def test_docstrings_come_in_order() -> None:
    source = (
        '"""Module."""\nclass A:\n    """A.\n\n    More.\n    """\n    def f(self):\n        "f"\nasync def g(): "g"\n'
    )
    assert docstrings(source) == "Module.\n\nA.\n\nMore.\n\nf\n\ng"
    assert docstrings("x = 1") == ""


def test_embedded_corpus_holds_a_module_out_of_both_domains(embedded_corpus_config: LmDataConfig) -> None:
    cfg = embedded_corpus_config
    modules = {text: name for name, text in read_stdlib().items()}
    held_out = {modules[text] for text in _cached(cfg, "validation")["python/code"]}
    trained = {modules[text] for text in _cached(cfg, "train")["python/code"]}
    assert held_out and not held_out & trained
    expected = [text for name, module in read_stdlib().items() if name in held_out and (text := docstrings(module))]
    assert _cached(cfg, "validation")["python/docstrings"] == expected


def test_embedded_corpus_is_a_staged_mixture_of_three_tagged_domains(embedded_corpus_config: LmDataConfig) -> None:
    cfg = embedded_corpus_config
    counts = read_counts(_root(cfg))
    assert list(counts) == list(cfg.components) == ["python/code", "python/docstrings", "english/reference"]
    assert counts["python/code"]["train"]["tokens"] > 1_000_000
    assert counts["english/reference"]["validation"]["tokens"] > 5_000
    assert isinstance(cfg.train_weights, list) and len(cfg.train_weights) == 2
    assert cfg.the_tokenizer.vocab_size == 1024
    assert cfg.the_tokenizer.eos_token_id == 0
    assert embedded_corpus(_root(cfg).parent, vocab_size=1024) == cfg
    assert json.loads((_root(cfg) / "tokenizer" / "tokenizer_config.json").read_text())["eos_token"] == EOS
