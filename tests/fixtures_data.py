"""Session fixtures that hold text data: one line in conftest.py, `pytest_plugins = ["tests.fixtures_data"]`."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig
    from levanter.tokenizers import HfMarinTokenizer

WORDS = ["grug", "brain", "say", "complexity", "very", "bad", "spirit", "demon", "enter", "codebase", "ögg", "日本"]


def make_text(seed: int, words: int) -> str:
    """Some lines of text, told apart by their first word."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(words // 8)]
    return f"document{seed}\n" + "\n".join(lines) + "\n"


def write_rolling_task(folder: Path) -> Path:
    """Writes a task of lm-eval, `rolling`, which scores three short documents whole."""
    (folder / "documents.jsonl").write_text('{"text": "grug brain say"}\n' * 3)
    task = {
        "task": "rolling",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "documents.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (folder / "rolling.yaml").write_text(yaml.safe_dump(task))
    return folder / "rolling.yaml"


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of text files: `caves` with 12, `clubs` with 6."""
    root = tmp_path_factory.mktemp("texts")
    for domain, first, number in (("caves", 0, 12), ("clubs", 100, 6)):
        (root / domain).mkdir()
        for seed in range(first, first + number):
            (root / domain / f"{seed}.txt").write_text(make_text(seed, 400))
    return root


@pytest.fixture(scope="session")
def small_corpus(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> "LmDataConfig":
    """A corpus of two domains, some thousand tokens each, vocabulary 300. Not to be written to."""
    from grug_native.data.corpus import local_text_data

    return local_text_data(
        {"caves": text_folder / "caves", "clubs": text_folder / "clubs"},
        cache_dir=tmp_path_factory.mktemp("corpora"),
        vocab_size=300,
        validation_fraction=0.2,
        mixture_block_size=8,
    )


@pytest.fixture(scope="session")
def tokenizer(small_corpus: "LmDataConfig") -> "HfMarinTokenizer":
    """That of `small_corpus`."""
    from levanter.tokenizers import HfMarinTokenizer

    tokenizer = small_corpus.the_tokenizer
    assert isinstance(tokenizer, HfMarinTokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def older_corpus(small_corpus: "LmDataConfig", tmp_path_factory: pytest.TempPathFactory) -> "LmDataConfig":
    """The same with levanter's own token caches, as corpora had them at first. Not to be written to."""
    from levanter.data.text.formats import TextLmDatasetFormat, preprocessor_for_format
    from levanter.store.cache import CacheMetadata, SerialCacheWriter

    root = shutil.copytree(Path(str(small_corpus.cache_dir)).parent, tmp_path_factory.mktemp("older") / "corpus")
    processor = preprocessor_for_format(TextLmDatasetFormat(), small_corpus.the_tokenizer)
    for domain in ("caves", "clubs"):
        for split in ("train", "validation"):
            shutil.rmtree(folder := root / "cache" / domain / split)
            lines = (root / "text" / f"{domain}.{split}.jsonl").read_text().splitlines()
            rows = [np.asarray(row["input_ids"]) for row in processor([json.loads(line) for line in lines])]
            metadata = CacheMetadata(preprocessor_metadata=processor.metadata)
            with SerialCacheWriter(str(folder), processor.output_exemplar, metadata, shard_name=split) as writer:
                writer.write_batch([{"input_ids": row} for row in rows])
    return replace(small_corpus, cache_dir=str(root / "cache"), tokenizer=str(root / "tokenizer"))


@pytest.fixture(scope="session")
def embedded_corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the default corpus is kept, made once a session for each vocabulary."""
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="session")
def embedded_corpus_config(embedded_corpora: Path) -> "LmDataConfig":
    """The default corpus, made once a session. Not to be written to."""
    from grug_native.data.corpus import embedded_corpus

    return embedded_corpus(embedded_corpora, vocab_size=1024)
