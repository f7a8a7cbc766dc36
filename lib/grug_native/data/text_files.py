"""The files of a folder that hold text, what kind each is, and what is left out of them, and why."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grug_native.host.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE

_TEXT = (
    ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .css .yaml .yml .toml .ini .cfg .log "
    ".py .pyi .c .h .cc .cpp .hpp .cu .java .kt .scala .go .rs .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .swift "
    ".sql .sh .hs .ml .m"
)
TEXT_SUFFIXES = frozenset(_TEXT.split())
"""Suffixes of files that are one document each."""

TABLE_SUFFIXES = frozenset({".json", ".csv", ".tsv"})
"""Suffixes of files that hold a document a row, and often hold something else: settings, numbers."""

ROW_SUFFIXES = TABLE_SUFFIXES | {".jsonl", ".parquet"}
"""Suffixes of files that hold a document a row."""

SUFFIXES = TEXT_SUFFIXES | ROW_SUFFIXES

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
"""Suffixes that may follow any of those, with pyarrow's names of what they mean."""

type Paths = str | Path | Sequence[str | Path]

_HIDDEN = "hidden"
_SHOWN = 3
"""So many files that were left out are named for each reason."""


def suffix(file: Path) -> str:
    """What kind of file it is: `A.TXT` is a `.txt`, and `a.jsonl.gz` a `.jsonl`."""
    return Path(file.stem if compression(file) else file.name).suffix.lower()


def compression(file: Path) -> str | None:
    """How a file is compressed, by its name; None if it is not."""
    return COMPRESSIONS.get(file.suffix.lower())


@dataclass(frozen=True)
class FoundFiles:
    """What a search for text files came to."""

    files: list[Path]
    """Those to read: in the order they were given, and those of a folder by name."""
    left_out: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Names of the others, by the reason why they are left out."""

    def describe_left_out(self) -> str:
        """The files left out, by reason, in a line; empty if there are none."""
        parts: list[str] = []
        for reason, names in self.left_out.items():
            if reason == _HIDDEN:
                parts.append(f"{len(names):,} hidden")
                continue
            suffixes = Counter(Path(name).suffix or Path(name).name for name in names)
            named = ", ".join(names) if len(names) <= _SHOWN else _counted(suffixes)
            parts.append(f"{len(names):,} ({reason}: {named})")
        return "; ".join(parts)


def _counted(suffixes: Counter[str]) -> str:
    shown = ", ".join(f"{count:,} {name}" for name, count in suffixes.most_common(8))
    return shown if len(suffixes) <= 8 else f"{shown}, ..."


def walk(folder: Path, *, leave_out: Sequence[Path] = ()) -> Iterator[tuple[Path, str | None]]:
    """Yields what is under a folder, by name, each with the reason why it cannot be text, or None; links are followed.

    A folder that is met again, through a link to it or to one above it, is not entered twice.

    Args:
        folder: where to look.
        leave_out: folders in it that are not entered, and not mentioned.
    """
    skipped = {path.resolve() for path in leave_out}
    entered: set[tuple[int, int]] = set()

    def enter(where: Path) -> Iterator[tuple[Path, str | None]]:
        status = where.stat()
        if (status.st_dev, status.st_ino) in entered:
            yield where, "a link to a folder that is read already"
            return
        entered.add((status.st_dev, status.st_ino))
        for entry in sorted(os.listdir(where)):
            path = where / entry
            if entry.startswith("."):
                yield path, _HIDDEN
            elif entry == "__pycache__":
                continue
            elif path.is_dir():
                if (path / CONFIG_FILE).is_file() and (path / CHECKPOINTS_FOLDER).is_dir():
                    if path.resolve() not in skipped:
                        yield path, "the folder of a run"
                elif path.resolve() not in skipped:
                    yield from enter(path)
            elif not path.is_file():
                yield path, "no file" if path.exists() else "a link to nothing"
            elif suffix(path) not in SUFFIXES:
                yield path, "of no kind that is read"
            elif path.stat().st_size == 0:
                yield path, "empty"
            else:
                yield path, None

    yield from enter(folder)


def known_suffixes() -> str:
    """The suffixes of what can be read, for a message."""
    return f"{' '.join(sorted(SUFFIXES))}, each also with {' '.join(COMPRESSIONS)} after it"
