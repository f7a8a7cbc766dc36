"""What the files of a corpus hold, counted before it is made; and which documents of it are held out.

A document that stands in the files more than once is one: the first is kept, and the others are dropped.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from grug_native.data.corpus_making import Heartbeat
from grug_native.data.documents import read_documents, read_rows

type Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class FileCounts:
    """What a file holds."""

    documents: int
    """Those that are kept."""
    bytes: int
    """Of their text, in UTF-8."""
    empty: int
    """Rows whose text is empty."""
    null: int
    """Rows whose text is null."""
    repeated: int
    """Documents that stood in the files before, and are dropped."""


@dataclass(frozen=True)
class Survey:
    """What some files hold, in their order."""

    files: Sequence[Path]
    """The files."""
    digests: Sequence[str]
    """Of the files."""
    text_key: str
    """Field or column of the text."""
    counts: Sequence[FileCounts]
    """Of each file."""
    places: Mapping[str, tuple[int, int]] | None = None
    """For the digest of each document its file, as an index, and its bytes; None if they were not read now."""

    @property
    def bytes(self) -> dict[Path, int]:
        """Bytes of text of each file."""
        return {file: counts.bytes for file, counts in zip(self.files, self.counts, strict=True)}

    def total(self, name: str) -> int:
        """Sum of a field of the counts over all files."""
        return sum(getattr(counts, name) for counts in self.counts)

    def record(self, domains: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
        """The survey as plain data, for `known_survey`."""
        domain_of = {file: domain for domain, files in domains.items() for file in files}
        top = os.path.commonpath([file.absolute().parent for file in self.files])
        rows = [
            {"file": os.path.relpath(file.absolute(), top), "domain": domain_of[file], "digest": digest}
            | asdict(counts)
            for file, digest, counts in zip(self.files, self.digests, self.counts, strict=True)
        ]
        return {"text_key": self.text_key, "files": rows}


def take_survey(files: Sequence[Path], digests: Sequence[str], text_key: str) -> Survey:
    """Reads all files.

    Raises:
        ValueError: names the file, and the line or row, that cannot be read.
    """
    heartbeat = Heartbeat("reading")
    places: dict[str, tuple[int, int]] = {}
    counts: list[FileCounts] = []
    total = 0
    for index, file in enumerate(files):
        found = {"documents": 0, "bytes": 0, "empty": 0, "null": 0, "repeated": 0}
        for text in read_rows(file, text_key):
            if not text:
                found["null" if text is None else "empty"] += 1
                continue
            data = text.encode()
            name = hashlib.sha256(data).hexdigest()
            if name in places:
                found["repeated"] += 1
                continue
            places[name] = index, len(data)
            found["documents"] += 1
            found["bytes"] += len(data)
            total += len(data)
            heartbeat.beat(f"{total / 1e6:,.1f} MB of text, file {len(counts) + 1:,} of {len(files):,}")
        counts.append(FileCounts(**found))
    return Survey(files, digests, text_key, counts, places)


def known_survey(
    records: Sequence[Path], files: Sequence[Path], digests: Sequence[str], text_key: str
) -> Survey | None:
    """Finds the survey that an earlier call made of the same files, in the records of corpora; else returns None."""
    for path in records:
        record = json.loads(path.read_text())
        rows = record["files"]
        if record["text_key"] == text_key and [row["digest"] for row in rows] == list(digests):
            names = ("documents", "bytes", "empty", "null", "repeated")
            return Survey(files, digests, text_key, [FileCounts(**{name: row[name] for name in names}) for row in rows])
    return None


def hold_out(sizes: Mapping[str, int], fraction: float) -> set[str]:
    """Chooses documents in the order of their names' digests, up to `fraction` of the total size.

    A document larger than that is never chosen, so at most twice the fraction is, and at times nothing.
    """
    budget = fraction * sum(sizes.values())
    chosen: set[str] = set()
    taken = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if taken >= budget:
            break
        if sizes[name] <= budget:
            chosen.add(name)
            taken += sizes[name]
    return chosen


def split_documents(survey: Survey, domain: str, files: Sequence[Path], fraction: float) -> Iterator[tuple[Split, str]]:
    """Yields the documents of a domain, each once, with its split; `fraction` is of the bytes of their text.

    Raises:
        ValueError: if there are none, or too little to split; or a file has changed since the survey.
    """
    places = survey.places
    assert places is not None
    index_of = {file: index for index, file in reversed(list(enumerate(survey.files)))}
    own = {index_of[file] for file in files}
    sizes = {name: size for name, (index, size) in places.items() if index in own}
    if not sizes:
        raise ValueError(f"{domain}: its files hold no text, or none that the files before them do not hold")
    total = sum(sizes.values())
    held_out = hold_out(sizes, fraction)
    # No document fits: the end of the largest one stands in.
    divided = max(sizes, key=lambda name: (sizes[name], name)) if fraction > 0 and not held_out else None
    seen: set[str] = set()
    for file in files:
        for text in read_documents(file, survey.text_key):
            data = text.encode()
            name = hashlib.sha256(data).hexdigest()
            if name not in places:
                raise ValueError(f"{file} has changed while it was read: run the same command again")
            if places[name][0] != index_of[file] or name in seen:
                continue
            seen.add(name)
            if name != divided:
                yield ("validation" if name in held_out else "train"), text
                continue
            cut = _cut(data, int(len(data) - fraction * total))
            if cut == 0:
                raise ValueError(f"{domain}: {len(data)} bytes are too few to split: set validation_fraction=0")
            yield "train", data[:cut].decode()
            yield "validation", data[cut:].decode()


def _cut(data: bytes, at: int) -> int:
    """The end of the last line before `at`, or else of the last character."""
    line = data.rfind(b"\n", 0, at) + 1
    if line:
        return line
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return max(at, 0)
