"""A corpus on disk: one folder, named by the digest of what it was made from, made once and reused.

It appears by a rename when it is complete, so that whatever kills its making leaves nothing half-made behind its name:

    tokenizer/                    tokenizer.json and tokenizer_config.json
    text/<domain>.<split>.jsonl   the documents, {"text": ...}
    cache/<domain>/<split>/       the token cache that levanter reads
    corpus.json                   counts of documents, bytes and tokens, by domain and split
"""

import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from grug_native.text_tokens import EOS_FOLLOWS_TEXT, DocumentTokenizer

type Split = Literal["train", "validation"]
type Domains = Mapping[str, Callable[[], Iterable[tuple[Split, str]]]]
"""For each domain what reads its documents, each with its split."""
type Counts = dict[str, dict[Split, dict[str, int]]]
"""`counts[domain][split]` has `documents`, `bytes` and `tokens`."""

EOS = "<|endoftext|>"
"""Ends every document. Where a text spells it out, it is text like any other."""

SPLITS: tuple[Split, ...] = ("train", "validation")

RECORD_FILE = "corpus.json"
"""Written last into the folder of a corpus; without it, there is none."""

_LAYOUT = 2
"""Part of a corpus' digest. Raise it when what is made of the same inputs changes. 1 had a space before each EOS."""
_TOKENIZER_CHARACTERS = 64 * 2**20
"""A tokenizer is trained on at most this much of each domain's text."""
_CACHE_CHARACTERS = 16 * 2**20
"""Tokenized and written at a time."""

logger = logging.getLogger(__name__)

_making: list[float] = []


def seconds_spent() -> float:
    """Returns how long this process has spent on making corpora."""
    return math.fsum(_making)


def file_digest(file: Path) -> str:
    """Returns the sha256 of a file, with its suffix."""
    with file.open("rb") as data:
        return f"{hashlib.file_digest(data, 'sha256').hexdigest()}{file.suffix}"


def text_file(root: Path, domain: str, split: Split) -> Path:
    """Returns where the documents of a split are."""
    return root / "text" / f"{domain}.{split}.jsonl"


def read_counts(root: Path) -> Counts:
    """Returns what a corpus holds."""
    return json.loads((root / RECORD_FILE).read_text())


def materialize(
    cache_dir: str | Path,
    inputs: Mapping[str, object],
    domains: Domains,
    vocab_size: int,
    tokenizer: str | Path | None,
) -> Path:
    """Returns the folder of the corpus, after making it if it is not there.

    Args:
        cache_dir: where corpora are kept.
        inputs: what decides the documents, as plain data; with the tokenizer, the corpus' identity.
        domains: read only if the corpus has to be made.
        vocab_size: of the tokenizer that is trained when `tokenizer` is None.
        tokenizer: folder with a `tokenizer.json`, or name on the Hugging Face hub.
    """
    if tokenizer is None:
        identity = [vocab_size, version("tokenizers")]
    else:
        file = Path(tokenizer) / "tokenizer.json"
        identity = file_digest(file) if file.is_file() else str(tokenizer)
    key = hashlib.sha256(json.dumps([_LAYOUT, identity, inputs], sort_keys=True).encode()).hexdigest()[:16]
    corpora = Path(cache_dir).resolve()
    root = corpora / key
    if (root / RECORD_FILE).is_file():
        return root
    logger.info("making a corpus of %s, once: texts, tokenizer, token caches", ", ".join(domains))
    start = time.monotonic()
    corpora.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=corpora, prefix=f".{key}-") as scratch:
        made = Path(scratch) / key
        counts = _write_texts(made, domains)
        if tokenizer is None:
            _train_tokenizer(made, vocab_size, domains)
        _write_caches(made, counts, str(tokenizer or made / "tokenizer"), str(tokenizer or root / "tokenizer"))
        (made / RECORD_FILE).write_text(json.dumps(counts, indent=1))
        try:
            made.rename(root)
        except OSError:
            # Another process has made the same corpus meanwhile.
            if not (root / RECORD_FILE).is_file():
                raise
    _making.append(time.monotonic() - start)
    logger.info("made the corpus %s in %.1f s", root, _making[-1])
    return root


def _write_texts(root: Path, domains: Domains) -> Counts:
    counts: Counts = {}
    for domain, read in domains.items():
        text_file(root, domain, "train").parent.mkdir(parents=True, exist_ok=True)
        counts[domain] = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
        with (
            text_file(root, domain, "train").open("w") as train,
            text_file(root, domain, "validation").open("w") as held,
        ):
            for split, text in read():
                print(json.dumps({"text": text}), file=train if split == "train" else held)
                counts[domain][split]["documents"] += 1
                counts[domain][split]["bytes"] += len(text.encode())
    return counts


def _read_texts(file: Path) -> Iterator[str]:
    with file.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _train_tokenizer(root: Path, vocab_size: int, domains: Iterable[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        for domain in domains:
            left = _TOKENIZER_CHARACTERS
            for text in _read_texts(text_file(root, domain, "train")):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    folder = root / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _write_caches(root: Path, counts: Counts, tokenizer: str, recorded_tokenizer: str) -> None:
    """Writes the caches in this process; levanter's own build would start three pipelines a cache."""
    import numpy as np
    from levanter.store.cache import CacheMetadata, SerialCacheWriter
    from levanter.tokenizers import load_tokenizer

    tokenize = DocumentTokenizer(load_tokenizer(tokenizer), recorded_tokenizer)
    metadata = CacheMetadata(preprocessor_metadata=tokenize.metadata)
    for domain, splits in counts.items():
        for split, count in splits.items():
            if count["documents"] == 0:
                continue
            folder = root / "cache" / domain / split
            with SerialCacheWriter(str(folder), tokenize.exemplar, metadata, shard_name=split) as writer:
                for texts in _chunks(_read_texts(text_file(root, domain, split))):
                    rows = [np.asarray(ids) for ids in tokenize(texts)]
                    writer.write_batch([{"input_ids": row} for row in rows])
                    count["tokens"] += sum(map(len, rows))
            (folder / EOS_FOLLOWS_TEXT).touch()


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CACHE_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
