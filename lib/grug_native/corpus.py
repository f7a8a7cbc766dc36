"""Text as an `LmDataConfig`, offline: anyone's own files, or what every Python carries.

Documents, splits, tokenizer and token caches are made on the first call with the same inputs, and found by later ones.
Importing this module is cheap; its functions import levanter.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from grug_native.corpus_store import (
    EOS,
    SPLITS,
    Domains,
    Split,
    file_digest,
    kept_tokenizer,
    materialize,
    read_counts,
    text_file,
)
from grug_native.data_record import relative_sources, write_sources
from grug_native.documents import Paths, docstrings, find_files, read_documents, read_stdlib, read_topics
from grug_native.mixture import Weights, check_names

if TYPE_CHECKING:
    import levanter.data.text.datasets

EMBEDDED_WEIGHTS: Weights = (
    (0, {"python/code": 0.7, "python/docstrings": 0.15, "english/reference": 0.15}),
    (128, {"python/code": 0.4, "python/docstrings": 0.3, "english/reference": 0.3}),
)
"""The default mixture of `embedded_corpus`: mostly code first, more prose from step 128 on."""


def local_text_data(
    paths: Mapping[str, Paths],
    *,
    cache_dir: str | Path,
    vocab_size: int = 4096,
    weights: Weights | None = None,
    validation_fraction: float = 0.05,
    text_key: str = "text",
    tokenizer: str | Path | None = None,
    keep_tokenizer: str | Path | None = None,
    mixture_block_size: int = 64,
) -> "levanter.data.text.datasets.LmDataConfig":
    """Makes training data of text files, or finds what an earlier call made of the same ones.

    Held out for validation are whole documents, chosen by the digest of their text; where no document is small enough
    (a domain of one big file), the end of the largest.

    Args:
        paths: for each domain its files and folders. A domain's name is its tag in the evaluation; `/` nests tags.
        cache_dir: where corpora are kept, each in a folder of its own.
        vocab_size: tokens of the byte-level BPE that is trained on the training split.
        weights: shares of the domains, or stages of them; by default all weigh the same.
        validation_fraction: of each domain's bytes, in [0, 0.5).
        text_key: field of a `.jsonl`, column of a `.parquet`.
        tokenizer: folder with a `tokenizer.json`, or name on the Hugging Face hub, to use in place of a new one.
        keep_tokenizer: likewise, of a run that goes on with these texts: theirs alone would make another one, if they
            are no longer those that it was made of.
        mixture_block_size: sequences within which the shares are exact. A stage must start at a multiple of it.

    Raises:
        ValueError: names the file, and the line or row, that cannot be read; or the argument that cannot be used.
    """
    _check(list(paths), weights, vocab_size, validation_fraction)
    files = {name: find_files(name, given) for name, given in paths.items()}
    digests = {file: file_digest(file) for found in files.values() for file in found}
    inputs: dict[str, object] = {
        "files": [[name, [digests[file] for file in found]] for name, found in files.items()],
        "text_key": text_key,
        "validation_fraction": validation_fraction,
    }

    def reader(name: str) -> Callable[[], Iterator[tuple[Split, str]]]:
        def read() -> Iterator[str]:
            return chain.from_iterable(read_documents(file, text_key) for file in files[name])

        return lambda: _split_documents(name, read, validation_fraction)

    tokenizer = tokenizer or kept_tokenizer(cache_dir, inputs, vocab_size, keep_tokenizer)
    root = materialize(cache_dir, inputs, {name: reader(name) for name in files}, vocab_size, tokenizer)
    write_sources(root, relative_sources((file, digests[file]) for found in files.values() for file in found))
    return _data_config(root, weights, tokenizer, mixture_block_size)


def embedded_corpus(
    cache_dir: str | Path,
    *,
    vocab_size: int = 4096,
    weights: Weights = EMBEDDED_WEIGHTS,
    validation_fraction: float = 0.1,
    keep_tokenizer: str | Path | None = None,
    mixture_block_size: int = 64,
) -> "levanter.data.text.datasets.LmDataConfig":
    """Makes training data of what every Python carries, about two million tokens: nothing to download.

    Three domains: `python/code` (the standard library), `python/docstrings` (of the same modules) and
    `english/reference` (the language reference). A module that is held out is held out of both Python domains.

    Args:
        cache_dir: where corpora are kept, each in a folder of its own.
        vocab_size: tokens of the byte-level BPE.
        weights: shares of the three domains, or stages of them.
        validation_fraction: of the bytes, in [0, 0.5).
        keep_tokenizer: as in `local_text_data`: of a run that another Python, or another version of this one, began.
        mixture_block_size: sequences within which the shares are exact. A stage must start at a multiple of it.

    Raises:
        ValueError: if this Python has no library sources, or an argument cannot be used.
    """
    _check(["python/code", "python/docstrings", "english/reference"], weights, vocab_size, validation_fraction)
    modules, topics = read_stdlib(), read_topics()
    inputs: dict[str, object] = {
        "embedded": [[[name, _digest(text)] for name, text in texts.items()] for texts in (modules, topics)],
        "validation_fraction": validation_fraction,
    }
    held_out = {
        name
        for texts in (modules, topics)
        for name in hold_out({name: len(text) for name, text in texts.items()}, validation_fraction)
    }

    def split(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[Split, str]]:
        return (("validation" if name in held_out else "train", text) for name, text in texts if text)

    domains: Domains = {
        "python/code": lambda: split(modules.items()),
        "python/docstrings": lambda: split((name, docstrings(text)) for name, text in modules.items()),
        "english/reference": lambda: split(topics.items()),
    }
    tokenizer = kept_tokenizer(cache_dir, inputs, vocab_size, keep_tokenizer)
    root = materialize(cache_dir, inputs, domains, vocab_size, tokenizer)
    texts = chain(modules.items(), ((f"reference of {name!r}", text) for name, text in topics.items()))
    write_sources(root, {name: (len(text.encode()), _digest(text)) for name, text in texts})
    return _data_config(root, weights, tokenizer, mixture_block_size)


def _check(names: Sequence[str], weights: Weights | None, vocab_size: int, validation_fraction: float) -> None:
    if not names:
        raise ValueError("paths is empty: name at least one domain")
    for name in names:
        # A domain's name is a folder that holds `train` and `validation`.
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or {".", "..", *SPLITS}.intersection(name.split("/")):
            raise ValueError(
                f"a domain cannot be named {name!r}: use letters, digits, '_', '-' and '.', with '/' to nest, and no "
                "part 'train' or 'validation'"
            )
    check_names(weights, names, "weights")
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and {EOS}")
    if not 0 <= validation_fraction < 0.5:
        raise ValueError(f"validation_fraction={validation_fraction} must lie in [0, 0.5)")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hold_out(sizes: Mapping[str, int], fraction: float) -> set[str]:
    """Chooses documents in the order of their names' digests, up to `fraction` of the total size.

    A document larger than that is never chosen, so at most twice the fraction is, and at times nothing.
    """
    budget = fraction * sum(sizes.values())
    chosen: set[str] = set()
    taken = 0
    for name in sorted(sizes, key=_digest):
        if taken >= budget:
            break
        if sizes[name] <= budget:
            chosen.add(name)
            taken += sizes[name]
    return chosen


def _split_documents(domain: str, read: Callable[[], Iterator[str]], fraction: float) -> Iterator[tuple[Split, str]]:
    sizes = {_digest(text): len(text) for text in read()}
    if not sizes:
        raise ValueError(f"{domain}: its files hold no text")
    held_out = hold_out(sizes, fraction)
    # No document fits: the end of the largest one stands in.
    divided = max(sizes, key=lambda name: (sizes[name], name)) if fraction > 0 and not held_out else None
    for text in read():
        name = _digest(text)
        if name == divided:
            at = int(len(text) - fraction * sum(sizes.values()))
            cut = text.rfind("\n", 0, at) + 1 or at
            if cut == 0:
                raise ValueError(f"{domain}: {len(text)} characters are too few to split: set validation_fraction=0")
            yield "train", text[:cut]
            yield "validation", text[cut:]
        else:
            yield ("validation" if name in held_out else "train"), text


def _data_config(
    root: Path, weights: Weights | None, tokenizer: str | Path | None, mixture_block_size: int
) -> "levanter.data.text.datasets.LmDataConfig":
    from levanter.data.text.datasets import DatasetComponent, LmDataConfig, UrlDatasetSourceConfig

    counts = read_counts(root)

    def urls(domain: str, split: Split) -> list[str]:
        return [str(text_file(root, domain, split))] if counts[domain][split]["documents"] else []

    if weights is None:
        train_weights = None
    elif isinstance(weights, Mapping):
        train_weights = dict(weights)
    else:
        train_weights = [(step, dict(shares)) for step, shares in weights]
    return LmDataConfig(
        tokenizer=str(tokenizer or root / "tokenizer"),
        cache_dir=str(root / "cache"),
        # The caches are there. One that is damaged is an error, and no reason to make another.
        auto_build_caches=False,
        components={
            domain: DatasetComponent(
                source=UrlDatasetSourceConfig(
                    train_urls=urls(domain, "train"), validation_urls=urls(domain, "validation")
                )
            )
            for domain in counts
        },
        train_weights=train_weights,
        shuffle=True,
        mixture_block_size=mixture_block_size,
    )
