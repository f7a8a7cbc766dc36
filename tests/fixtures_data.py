"""Session fixtures that hold text data: one line in conftest.py, `pytest_plugins = ["tests.fixtures_data"]`."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig

WORDS = ["grug", "brain", "say", "complexity", "very", "bad", "spirit", "demon", "enter", "codebase", "ögg", "日本"]


def make_text(seed: int, words: int) -> str:
    """Some lines of text, told apart by their first word."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(words // 8)]
    return f"document{seed}\n" + "\n".join(lines) + "\n"


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
    from grug_native.corpus import local_text_data

    return local_text_data(
        {"caves": text_folder / "caves", "clubs": text_folder / "clubs"},
        cache_dir=tmp_path_factory.mktemp("corpora"),
        vocab_size=300,
        validation_fraction=0.2,
        mixture_block_size=8,
    )


@pytest.fixture(scope="session")
def embedded_corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the default corpus is kept, made once a session for each vocabulary."""
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="session")
def embedded_corpus_config(embedded_corpora: Path) -> "LmDataConfig":
    """The default corpus, made once a session. Not to be written to."""
    from grug_native.corpus import embedded_corpus

    return embedded_corpus(embedded_corpora, vocab_size=1024)
