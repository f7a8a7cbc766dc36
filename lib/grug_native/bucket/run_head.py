"""`run.json`: all that changes in a run's folder in a bucket, as one value.

It says who owns the run, which checkpoints are committed, which are set aside, and which objects make up the record.
What it does not name is no part of the run. Each version is made from the one before by a method here, and has a new
`serial`, so that no two have the same bytes: the version of an object on S3 is the MD5 of its bytes.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, cast, final, get_args, get_origin, get_type_hints

from grug_native.bucket.owner import Owner
from grug_native.checkpoint.metadata import CheckpointError, CheckpointKind, canonical_hash

HEAD = "run.json"
"""The key of the head."""

FORMAT_VERSION = 1
"""Raised with every change that an older reader would misread."""

_EPOCH = r"(?P<epoch>\d+)-[0-9a-f]{8}"
_NAMES = {
    "checkpoints/": re.compile(rf"checkpoints/step-(?P<step>\d+)\.{_EPOCH}/"),
    "log/": re.compile(rf"log/(?P<step>\d+|live)\.{_EPOCH}\.jsonl"),
    "files/": re.compile(rf"files/(?P<step>.+)\.{_EPOCH}"),
}
"""How the names of what a run writes look, by the folder they are in."""

Folder = Literal["checkpoints/", "log/", "files/"]


class HeadError(RuntimeError):
    """`run.json` cannot be used."""


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointEntry:
    """A committed checkpoint, or one that was set aside."""

    step: int
    """Updates done."""
    kind: CheckpointKind
    """Whether it is kept for good."""
    root: str | None
    """The URL of the folder that its name is in; None for the run's own."""
    prefix: str
    """What the names of its objects begin with."""
    sha256: str
    """Of its metadata."""


@final
@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A checkpoint that is not loaded any more, and not touched either."""

    entry: CheckpointEntry
    """Which."""
    label: Literal["corrupt", "abandoned"]
    """Damaged, or stepped back over."""
    why: str
    """In words."""


@final
@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of the record: whole lines of `metrics.jsonl`."""

    name: str
    """Its key."""
    first: int
    """The step of its first line."""
    size: int
    """Bytes."""
    sha256: str
    """Of them."""


@final
@dataclass(frozen=True, kw_only=True)
class SmallFile:
    """A file of the run: its config, samples, a plot."""

    path: str
    """What it is called in the run."""
    name: str
    """The key of its present version."""
    sha256: str
    """Of that."""


@final
@dataclass(frozen=True, kw_only=True)
class RunHead:
    """A run's folder. Plain data; what breaks its laws cannot be made."""

    run_id: str
    """The run's name."""
    format_version: int = FORMAT_VERSION
    """Of `run.json`."""
    epoch: int = 0
    """Raised by every new owner, and part of the name of all that it writes."""
    serial: int = 0
    """Raised by every change."""
    owner: Owner | None = None
    """None: nobody; the last one has ended in order."""
    checkpoints: tuple[CheckpointEntry, ...] = ()
    """Oldest first."""
    set_aside: tuple[SetAside, ...] = ()
    """In the order in which it was done."""
    log: tuple[Segment, ...] = ()
    """The record, in order."""
    files: tuple[SmallFile, ...] = ()
    """Sorted by path."""

    def __post_init__(self) -> None:
        steps, firsts, paths = self.steps, [s.first for s in self.log], [f.path for f in self.files]
        if steps != sorted(set(steps)) or firsts != sorted(set(firsts)) or paths != sorted(set(paths)):
            raise ValueError(f"steps {steps}, segments from {firsts} and files {paths} must each rise")
        names = self.names()
        if len(set(names)) != len(names):
            raise ValueError(f"{sorted(n for n in set(names) if names.count(n) > 1)} is named twice")
        for name in names:
            epoch = epoch_of(name)
            if epoch is None or epoch > self.epoch:
                raise ValueError(f"{name!r} is no name that epoch {self.epoch} or an older one gave")

    @property
    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, rising."""
        return [entry.step for entry in self.checkpoints]

    @property
    def record_bytes(self) -> int:
        """The size of the committed record."""
        return sum(segment.size for segment in self.log)

    def names(self) -> list[str]:
        """Returns the names of all that belongs to the run."""
        entries = (*self.checkpoints, *(aside.entry for aside in self.set_aside))
        return [*(e.prefix for e in entries), *(s.name for s in self.log), *(f.name for f in self.files)]

    def claimed(self, owner: Owner) -> "RunHead":
        """With a new owner and epoch."""
        return replace(self, owner=owner, epoch=self.epoch + 1)

    def released(self) -> "RunHead":
        """Without an owner."""
        return replace(self, owner=None)

    def committed(
        self, entry: CheckpointEntry, segment: Segment | None, written: Sequence[SmallFile] = ()
    ) -> "RunHead":
        """With a checkpoint, which takes the place of one of the same step, and what the run said until then.

        Raises:
            CheckpointError: Newer checkpoints are there.
        """
        if entry in self.checkpoints:  # a commit whose answer was lost
            return self
        if newer := [step for step in self.steps if step > entry.step]:
            raise CheckpointError(f"cannot commit step {entry.step}: steps {newer} are newer; roll back first")
        others = tuple(c for c in self.checkpoints if c.step != entry.step)
        return replace(self.recorded(segment, written), checkpoints=(*others, entry))

    def recorded(self, segment: Segment | None, written: Sequence[SmallFile] = ()) -> "RunHead":
        """With more of the record, and new versions of files."""
        log = self.log if segment is None or segment in self.log else (*self.log, segment)
        kept = {file.path: file for file in (*self.files, *written)}
        return replace(self, log=log, files=tuple(kept[path] for path in sorted(kept)))

    def without(self, entries: Sequence[CheckpointEntry]) -> "RunHead":
        """Without some checkpoints."""
        return replace(self, checkpoints=tuple(c for c in self.checkpoints if c not in entries))

    def aside(self, entries: Sequence[CheckpointEntry], label: Literal["corrupt", "abandoned"], why: str) -> "RunHead":
        """With some checkpoints set aside."""
        moved = tuple(SetAside(entry=c, label=label, why=why) for c in self.checkpoints if c in entries)
        return replace(self.without(entries), set_aside=(*self.set_aside, *moved))

    def pardoned(self) -> "RunHead":
        """With the damaged checkpoints counted among those that were stepped back over: the run starts anew."""
        return replace(self, set_aside=tuple(replace(aside, label="abandoned") for aside in self.set_aside))

    def cut(self, step: int) -> "RunHead":
        """With the record of the steps before `step`: segments end where a checkpoint was committed."""
        return replace(self, log=tuple(segment for segment in self.log if segment.first < step))

    def with_kind(self, step: int, kind: CheckpointKind) -> "RunHead":
        """With another kind of one checkpoint."""
        changed = (replace(c, kind=kind) if c.step == step else c for c in self.checkpoints)
        return replace(self, checkpoints=tuple(changed))

    def encode(self) -> bytes:
        """Returns the bytes of `run.json`."""
        body = asdict(self)
        return json.dumps({"sha256": canonical_hash(body), "run": body}, indent=1).encode()

    @staticmethod
    def decode(data: bytes, *, where: str) -> "RunHead":
        """Reads `run.json`, and takes nothing that this module did not write.

        Raises:
            HeadError: It is damaged, or a newer version wrote it.
        """
        try:
            file = json.loads(data)
            body = file["run"]
            if canonical_hash(body) != file["sha256"]:
                raise ValueError("its SHA-256 is another than it says")
            if body["format_version"] != FORMAT_VERSION:
                raise HeadError(
                    f"{where} has format_version={body['format_version']}, and this version reads {FORMAT_VERSION}: use"
                    " the grug-native that wrote it"
                )
            return cast(RunHead, _typed(RunHead, body, ""))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise HeadError(
                f"{where} is damaged ({error!r}): put back an earlier version of this object, if the bucket keeps"
                " versions, or give another output_path. Nothing else was touched"
            ) from error


def new_name(folder: Folder, name: int | str, epoch: int) -> str:
    """Returns a name that no other attempt has: of a checkpoint or segment by its step, of a file by its path."""
    unique = f"{name}.{epoch}-{secrets.token_hex(4)}"
    return {
        "checkpoints/": f"checkpoints/step-{unique}/",
        "log/": f"log/{unique}.jsonl",
        "files/": f"files/{unique}",
    }[folder]


def live_name(owner: Owner, epoch: int) -> str:
    """Returns the key of the tail of the record that is not committed yet."""
    return f"log/live.{epoch}-{owner.nonce}.jsonl"


def epoch_of(name: str) -> int | None:
    """Returns the epoch that gave a name; None if it is none of ours."""
    match = next(
        (m for folder, form in _NAMES.items() if name.startswith(folder) and (m := form.fullmatch(name))), None
    )
    return int(match["epoch"]) if match else None


def attempt_of(key: str) -> str:
    """Returns the name that `RunHead` gives to what the object at `key` is of: a checkpoint's prefix, or the key."""
    match = re.match(r"checkpoints/[^/]+/", key)
    return match[0] if match else key


def digest(data: bytes) -> str:
    """Returns the SHA-256."""
    return hashlib.sha256(data).hexdigest()


def _typed(kind: Any, raw: Any, where: str) -> Any:
    """Plain JSON as the dataclass `kind`, with every field and no other, each of its type."""
    origin = get_origin(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(raw, dict) or set(raw) != {field.name for field in fields(kind)}:
            raise ValueError(f"{where or 'run'} has not the fields of {kind}")
        return cast(Any, kind)(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in raw.items()})
    if origin is tuple:
        if not isinstance(raw, list):
            raise ValueError(f"{where} is no list")
        return tuple(_typed(get_args(kind)[0], value, where) for value in cast(list[Any], raw))
    if origin is UnionType:
        return None if raw is None else _typed(next(k for k in get_args(kind) if k is not NoneType), raw, where)
    if origin is Literal:
        if raw not in get_args(kind):
            raise ValueError(f"{where}={raw!r} is none of {get_args(kind)}")
        return raw
    if type(raw) is not kind or (kind is int and raw < 0):
        raise ValueError(f"{where}={raw!r} is no {kind.__name__}")
    return raw
