"""Which files a run is trained on, so that a change of them can be told in words.

A corpus keeps a list of the files that it was made of (see `grug_native.data.corpus_store`); a run keeps in `data.json`
what it has been trained on, by the fingerprint that its checkpoints carry.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grug_native.data.corpus_store import SOURCES_FILE

DATA_FILE = "data.json"
"""In the folder of a run."""

_NAMED = 5
"""So many files are named of each kind of change."""

type Sources = Mapping[str, tuple[int, str]]
"""By name, size in bytes and digest."""


@dataclass(frozen=True)
class DataRecord:
    """What a data fingerprint stands for."""

    digests: Mapping[str, str]
    """The parts of the fingerprint, see `grug_native.data.cache.data_fingerprint`."""
    files: Sources = field(default_factory=dict[str, tuple[int, str]])
    """The files that the data were made of, as far as that is known."""


def read_sources(corpus: Path) -> dict[str, tuple[int, str]]:
    """Returns the files of a corpus, with the bytes of their text; none, if it has no list."""
    path = corpus / SOURCES_FILE
    rows = json.loads(path.read_text())["files"] if path.is_file() else []
    return {row["file"]: (row["bytes"], row["digest"]) for row in rows}


def add_record(run: Path, fingerprint: str, record: DataRecord) -> None:
    """Keeps in a run's folder what a fingerprint stands for."""
    known = read_records(run)
    if fingerprint not in known:
        _write(run / DATA_FILE, {name: asdict(of) for name, of in (known | {fingerprint: record}).items()})


def read_records(run: Path) -> dict[str, DataRecord]:
    """Returns what the fingerprints of a run stand for, as far as that is known."""
    path = run / DATA_FILE
    if not path.is_file():
        return {}
    raw: dict[str, dict[str, dict[str, object]]] = json.loads(path.read_text())
    return {
        name: DataRecord({part: str(of) for part, of in body["digests"].items()}, _sources(body["files"]))
        for name, body in raw.items()
    }


def explain_change(old: DataRecord | None, new: DataRecord | None) -> str:
    """Says in words how other data differ from those of a checkpoint."""
    if old is None or new is None:
        return "which files changed is not known: the run kept no list of them"
    parts = [name for name in {**old.digests, **new.digests} if old.digests.get(name) != new.digests.get(name)]
    words = [*_changed_files(old.files, new.files)]
    if components := [name.removeprefix("component/") for name in parts if name.startswith("component/")]:
        words.append(f"other tokens in {', '.join(components)}")
    if "tokenizer" in parts:
        words.append("another tokenizer")
    if "config" in parts:
        words.append("other weights, order or shuffling in the data config")
    return "; ".join(words)


def _changed_files(old: Sources, new: Sources) -> Iterable[str]:
    before, after = ({digest for _, digest in files.values()} for files in (old, new))
    added, removed = (
        [name for name, (_, digest) in files.items() if name not in others and digest not in known]
        for files, others, known in ((new, old, before), (old, new, after))
    )
    changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
    renamed = [name for name, (_, digest) in new.items() if name not in old and digest in before]
    for names, verb, files in ((added, "came", new), (removed, "went", old)):
        if names:
            yield f"{_counted(names)} {verb} ({_listed(f'{name}, {files[name][0]:,} bytes' for name in names)})"
    if changed:
        sizes = (f"{name}, {old[name][0]:,} to {new[name][0]:,} bytes" for name in sorted(changed))
        yield f"{_counted(changed)} changed ({_listed(sizes)})"
    if renamed:
        yield f"{_counted(renamed)} got another name ({_listed(renamed)})"


def _counted(names: list[str]) -> str:
    return f"{len(names)} file" + "s" * (len(names) > 1)


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    more = f"; and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return "; ".join(words[:_NAMED]) + more


def _sources(raw: Mapping[str, object]) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for name, value in raw.items():
        assert isinstance(value, list)
        size, digest = value
        found[name] = (int(size), str(digest))
    return found


def _write(path: Path, content: object) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False))
    partial.replace(path)
