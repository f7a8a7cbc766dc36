"""Text as an `LmDataConfig`, offline: anyone's own files, or what every Python carries.

Documents, splits, tokenizer and token caches are made on the first call with the same inputs, and found by later ones.
Importing this module is cheap; its functions import levanter.
"""

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from grug_native.data.corpus_store import (
    EOS,
    SPLITS,
    Domains,
    describe_counts,
    file_digest,
    kept_tokenizer,
    materialize,
    read_counts,
    text_file,
)
from grug_native.data.documents import find_files
from grug_native.data.mixture import Weights, check_names
from grug_native.data.python_texts import docstrings, read_stdlib, read_topics
from grug_native.data.text_files import Paths
from grug_native.data.text_survey import Split, Survey, hold_out, split_documents, take_survey

if TYPE_CHECKING:
    import levanter.data.text.datasets

_NAME_BYTES = 120

logger = logging.getLogger(__name__)

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
    (a domain of one big file), the end of the largest. A document that stands in the files more than once, of whatever
    domain, is taken once, where it comes first.

    Args:
        paths: for each domain its files and folders. A domain's name is its tag in the evaluation; `/` nests tags.
        cache_dir: where corpora are kept, each in a folder of its own.
        vocab_size: tokens of the byte-level BPE that is trained on the training split.
        weights: shares of the domains, or stages of them; by default all weigh the same.
        validation_fraction: of each domain's bytes, in [0, 0.5).
        text_key: field of a `.jsonl` or `.json`, column of a `.parquet`, `.csv` or `.tsv`.
        tokenizer: folder with a `tokenizer.json`, or name on the Hugging Face hub, to use in place of a new one.
        keep_tokenizer: likewise, of a run that goes on with these texts: theirs alone would make another one, if they
            are no longer those that it was made of.
        mixture_block_size: sequences within which the shares are exact. A stage must start at a multiple of it.

    Raises:
        ValueError: names the file, and the line or row, that cannot be read; or the argument that cannot be used.
    """
    _check(list(paths), weights, vocab_size, validation_fraction)
    files = {name: find_files(name, given, text_key=text_key).files for name, given in paths.items()}
    return data_of_files(
        files,
        cache_dir=cache_dir,
        vocab_size=vocab_size,
        weights=weights,
        validation_fraction=validation_fraction,
        text_key=text_key,
        tokenizer=tokenizer,
        keep_tokenizer=keep_tokenizer,
        mixture_block_size=mixture_block_size,
    )


def data_of_files(
    files: Mapping[str, Sequence[Path]],
    *,
    cache_dir: str | Path,
    vocab_size: int,
    weights: Weights | None,
    validation_fraction: float = 0.05,
    text_key: str = "text",
    tokenizer: str | Path | None = None,
    keep_tokenizer: str | Path | None = None,
    mixture_block_size: int = 64,
    survey: Survey | None = None,
) -> "levanter.data.text.datasets.LmDataConfig":
    """`local_text_data` of files that have been found, and maybe read, already.

    Args:
        files: for each domain its files.
        cache_dir: as there; so are all that follow but the last.
        vocab_size: tokens.
        weights: of the domains.
        validation_fraction: of each domain's bytes.
        text_key: field or column.
        tokenizer: to use in place of a new one.
        keep_tokenizer: of a run that goes on.
        mixture_block_size: sequences.
        survey: of just these files, if one was taken.

    Raises:
        ValueError: names the file, and the line or row, that cannot be read; or the argument that cannot be used.
    """
    _check(list(files), weights, vocab_size, validation_fraction)
    listed = list(chain.from_iterable(files.values())) if survey is None else survey.files
    digests = [file_digest(file) for file in listed] if survey is None else survey.digests
    digest_of = dict(zip(listed, digests, strict=True))
    inputs: dict[str, object] = {
        "files": [[name, [digest_of[file] for file in found]] for name, found in files.items()],
        "text_key": text_key,
        "validation_fraction": validation_fraction,
    }

    @cache
    def surveyed() -> Survey:
        if survey is not None and survey.places is not None:
            return survey
        return take_survey(listed, digests, text_key)

    def reader(name: str) -> Callable[[], Iterator[tuple[Split, str]]]:
        return lambda: split_documents(surveyed(), name, files[name], validation_fraction)

    tokenizer = tokenizer or kept_tokenizer(cache_dir, inputs, vocab_size, keep_tokenizer)
    root = materialize(
        cache_dir,
        inputs,
        {name: reader(name) for name in files},
        vocab_size,
        tokenizer,
        sources=lambda: surveyed().record(files),
    )
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

    def sources() -> dict[str, object]:
        texts = chain(modules.items(), ((f"reference of {name!r}", text) for name, text in topics.items()))
        rows = [{"file": name, "digest": _digest(text), "bytes": len(text.encode())} for name, text in texts]
        return {"text_key": None, "files": rows}

    tokenizer = kept_tokenizer(cache_dir, inputs, vocab_size, keep_tokenizer)
    root = materialize(cache_dir, inputs, domains, vocab_size, tokenizer, sources=sources)
    return _data_config(root, weights, tokenizer, mixture_block_size)


def _check(names: Sequence[str], weights: Weights | None, vocab_size: int, validation_fraction: float) -> None:
    if not names:
        raise ValueError("paths is empty: name at least one domain")
    for name in names:
        if not all(part and domain_name(part) == part for part in name.split("/")):
            raise ValueError(
                f"a domain cannot be named {name!r}: use letters, digits, '_', '-' and '.', with '/' to nest, and no "
                f"part 'train' or 'validation', none that begins with '.' or '-', and none over {_NAME_BYTES} bytes"
            )
    check_names(weights, names, "weights")
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and {EOS}")
    if not 0 <= validation_fraction < 0.5:
        raise ValueError(f"validation_fraction={validation_fraction} must lie in [0, 0.5)")


def domain_name(text: str) -> str:
    """Returns the nearest that a domain, or a part of its name, can be called to `text`.

    It is a folder that holds `train` and `validation`, and levanter expands `{`, `*` and others in paths.
    """
    kept = "".join(c if c.isalnum() or c in "._-" or unicodedata.category(c)[0] == "M" else "-" for c in text)
    cut = kept.strip(".-").encode()[:_NAME_BYTES].decode(errors="ignore")
    return "text" if not cut or cut in SPLITS else cut


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _data_config(
    root: Path, weights: Weights | None, tokenizer: str | Path | None, mixture_block_size: int
) -> "levanter.data.text.datasets.LmDataConfig":
    from levanter.data.text.datasets import DatasetComponent, LmDataConfig, UrlDatasetSourceConfig

    counts = read_counts(root)
    for domain, described in describe_counts(counts).items():
        logger.info("%s: %s", domain, described)

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
