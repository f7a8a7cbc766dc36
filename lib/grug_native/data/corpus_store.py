"""A corpus on disk: one folder, named by the digest of what it was made from, made once and reused.

It appears by a rename when it is complete, so that whatever kills its making leaves nothing half-made behind its name:

    tokenizer/                    tokenizer.json and tokenizer_config.json
    text/<domain>.<split>.jsonl   the documents, {"text": ...}
    cache/<domain>/<split>/       the token cache that levanter reads
    sources.json                  the files that it was made of, and what each held
    corpus.json                   counts of documents, bytes and tokens, by domain and split
"""

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grug_native.data.corpus_making import (
    Heartbeat,
    die_with_parent,
    full_disk_told,
    interruptible,
    run_module,
    scratch_folder,
    sweep_scratch,
)
from grug_native.data.text_files import compression, suffix
from grug_native.data.text_survey import Split
from grug_native.data.text_tokens import EOS_FOLLOWS_TEXT, DocumentTokenizer
from grug_native.data.vocabulary import record_vocabulary

type Domains = Mapping[str, Callable[[], Iterable[tuple[Split, str]]]]
"""For each domain what reads its documents, each with its split."""
type Counts = dict[str, dict[Split, dict[str, int]]]
"""`counts[domain][split]` has `documents`, `bytes` and `tokens`."""

EOS = "<|endoftext|>"
"""Ends every document. Where a text spells it out, it is text like any other."""

SPLITS: tuple[Split, ...] = ("train", "validation")

RECORD_FILE = "corpus.json"
"""Written last into the folder of a corpus; without it, there is none."""

SOURCES_FILE = "sources.json"
"""Record of the files, in the folder of a corpus that was made of files."""

_LAYOUT = 2
"""Part of a corpus' digest. Raise it when what is made of the same inputs changes. 1 had a space before each EOS."""
_TOKENIZER_CHARACTERS = 64 * 2**20
"""A tokenizer is trained on at most this much of each domain's text."""
_CACHE_CHARACTERS = 2**18
"""Tokenized at a time, in a fraction of a second, so that Ctrl-C need not wait."""
_WRITTEN_TOKENS = 2**22
"""Written to a cache at a time."""
_LONGEST_PRETOKEN = 128
"""Characters. The time to train a BPE grows with the square of a pre-token's length: a line of 600 KB without a space
would take hours."""
_PRETOKENS = "|".join(
    (
        "'s|'t|'re|'ve|'m|'ll|'d",
        *(rf" ?{kind}{{1,{_LONGEST_PRETOKEN}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]")),
        *(rf"\s{{1,{_LONGEST_PRETOKEN}}}{end}" for end in (r"(?!\S)", "")),
    )
)
"""The pre-tokens of GPT-2, none longer than that."""

logger = logging.getLogger(__name__)

_making: list[float] = []


def seconds_spent() -> float:
    """Returns how long this process has spent on making corpora."""
    return math.fsum(_making)


def file_digest(file: Path) -> str:
    """Returns the sha256 of a file, with its kind."""
    with file.open("rb") as data:
        return f"{hashlib.file_digest(data, 'sha256').hexdigest()}{suffix(file)}{compression(file) or ''}"


def text_file(root: Path, domain: str, split: Split) -> Path:
    """Returns where the documents of a split are."""
    return root / "text" / f"{domain}.{split}.jsonl"


def read_counts(root: Path) -> Counts:
    """Returns what a corpus holds."""
    return json.loads((root / RECORD_FILE).read_text())


def describe_counts(counts: Counts) -> dict[str, str]:
    """For each domain what is trained on and what is held out, in words."""

    def described(count: Mapping[str, int]) -> str:
        documents = "1 document" if count["documents"] == 1 else f"{count['documents']:,} documents"
        return f"{documents}, {count['bytes']:,} bytes, {count['tokens']:,} tokens"

    words: dict[str, str] = {}
    for domain, splits in counts.items():
        train, held = splits["train"], splits["validation"]
        share = held["bytes"] / max(train["bytes"] + held["bytes"], 1)
        words[domain] = f"train {described(train)}; held out {described(held)} ({share:.1%} of the bytes)"
    return words


def materialize(
    cache_dir: str | Path,
    inputs: Mapping[str, object],
    domains: Domains,
    vocab_size: int,
    tokenizer: str | Path | None,
    sources: Callable[[], Mapping[str, Any]] | None = None,
) -> Path:
    """Returns the folder of the corpus, after making it if it is not there.

    Args:
        cache_dir: where corpora are kept.
        inputs: what decides the documents, as plain data; with the tokenizer, the corpus' identity.
        domains: read only if the corpus has to be made.
        vocab_size: of the tokenizer that is trained when `tokenizer` is None.
        tokenizer: folder with a `tokenizer.json`, or name on the Hugging Face hub.
        sources: makes the record of the files, once the domains have been read.
    """
    key = _key(inputs, vocab_size, tokenizer)
    corpora = Path(cache_dir).resolve()
    root = corpora / key
    sweep_scratch(corpora)
    if (root / RECORD_FILE).is_file():
        return root
    logger.info("making a corpus of %s, once: texts, tokenizer, token caches", ", ".join(domains))
    start = time.monotonic()
    corpora.mkdir(parents=True, exist_ok=True)
    with full_disk_told(corpora), scratch_folder(corpora, key) as scratch:
        made = scratch / key
        counts = _write_texts(made, domains)
        if sources is not None:
            (made / SOURCES_FILE).write_text(json.dumps(sources(), indent=1))
        if tokenizer is None:
            # In a process of its own: the trainer hears no Ctrl-C.
            arguments = [str(os.getpid()), str(made), str(vocab_size), *domains]
            run_module(["grug_native.data.corpus_store", *arguments], "training the tokenizer")
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


def _key(inputs: Mapping[str, object], vocab_size: int, tokenizer: str | Path | None) -> str:
    if tokenizer is None:
        identity = [vocab_size, version("tokenizers")]
    else:
        file = Path(tokenizer) / "tokenizer.json"
        identity = file_digest(file) if file.is_file() else str(tokenizer)
    return hashlib.sha256(json.dumps([_LAYOUT, identity, inputs], sort_keys=True).encode()).hexdigest()[:16]


def kept_tokenizer(
    cache_dir: str | Path, inputs: Mapping[str, object], vocab_size: int, kept: str | Path | None
) -> str | Path | None:
    """Returns `kept`, a run's own tokenizer, if a new one for these inputs would be, or is, another; else None.

    One that has been deleted is made anew: of the same texts it is the same, and who resumes the run compares them.
    """
    if kept is None or (Path(kept).is_absolute() and not Path(kept).is_dir()):
        return None
    new, old = (
        folder / "tokenizer.json"
        for folder in (Path(cache_dir) / _key(inputs, vocab_size, None) / "tokenizer", Path(kept))
    )
    same = new.is_file() and old.is_file() and new.read_bytes() == old.read_bytes()
    return None if same else kept


def _write_texts(root: Path, domains: Domains) -> Counts:
    counts: Counts = {}
    heartbeat = Heartbeat("writing texts")
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
                heartbeat.beat(f"{_total_bytes(counts) / 1e6:,.1f} MB")
    return counts


def _total_bytes(counts: Counts) -> int:
    return sum(count["bytes"] for splits in counts.values() for count in splits.values())


def _read_texts(file: Path) -> Iterator[str]:
    with file.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _train_tokenizer(root: Path, vocab_size: int, domains: Iterable[str]) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        for domain in domains:
            left = _TOKENIZER_CHARACTERS
            for text in _read_texts(text_file(root, domain, "train")):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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

    loaded = load_tokenizer(tokenizer)
    tokenize = DocumentTokenizer(loaded, recorded_tokenizer)
    metadata = CacheMetadata(preprocessor_metadata=tokenize.metadata)
    heartbeat, done = Heartbeat("tokenizing"), 0
    for domain, splits in counts.items():
        for split, count in splits.items():
            if count["documents"] == 0:
                continue
            folder = root / "cache" / domain / split
            with SerialCacheWriter(str(folder), tokenize.exemplar, metadata, shard_name=split) as writer:
                rows: list[np.ndarray] = []
                for texts in _chunks(_read_texts(text_file(root, domain, split))):
                    rows += [np.asarray(ids) for ids in interruptible(partial(tokenize, texts))]
                    if sum(map(len, rows)) >= _WRITTEN_TOKENS:
                        writer.write_batch([{"input_ids": row} for row in rows])
                        count["tokens"] += sum(map(len, rows))
                        rows = []
                    done += sum(len(text.encode()) for text in texts)
                    heartbeat.beat(f"{done / 1e6:,.1f} of {_total_bytes(counts) / 1e6:,.1f} MB")
                if rows:
                    writer.write_batch([{"input_ids": row} for row in rows])
                    count["tokens"] += sum(map(len, rows))
            (folder / EOS_FOLLOWS_TEXT).touch()
            record_vocabulary(str(folder), loaded)


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


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    _train_tokenizer(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
