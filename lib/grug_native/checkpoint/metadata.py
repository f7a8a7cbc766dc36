"""What a checkpoint says about itself: a small, self-checking JSON file beside Orbax's, and how it is compared.

Only the standard library here, and what needs no more: listing and comparing a run's checkpoints opens no device and
no array.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, override

from grug_native.data.record import DataRecord, explain_change
from grug_native.host.process import code_commit
from grug_native.host.run_folder import fsync
from grug_native.host.shell import offer
from grug_native.parsing.old_configs import upgraded

METADATA_FILE = "grug_checkpoint.json"
"""The file's name; a step folder without it is no checkpoint."""

FORMAT_VERSION = 1
"""Raised with every change that an older reader would misread."""

_MAX_FILE_BYTES = 1 << 26
_SHOWN_DIGITS = 12
"""Of a digest, in a message."""
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
"""What the system says of a file that is not what was written; the rest (EACCES, ESTALE, ENOMEM, ...) is about us."""
_RECORDED_PACKAGES = ("grug-native", "jax", "jaxlib", "orbax-checkpoint", "equinox", "optax", "marin-levanter")

CheckpointKind = Literal["permanent", "temporary"]
"""`permanent` is kept for good; `temporary` until a newer checkpoint is committed and verified."""

RECORDED_ENVIRONMENT = (
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_X64",
    "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)
"""The only environment variables whose values are ever written down: they change numbers, and hold no secrets."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files do not hold what was saved."""


class NoUsableCheckpointError(CheckpointError):
    """Checkpoints are there, and none of them verifies; a fresh start would hide it."""


def no_usable_checkpoint(folder: object, remains: Sequence[str]) -> NoUsableCheckpointError:
    """The refusal of a folder in which nothing is left but `remains`."""
    return NoUsableCheckpointError(
        f"no usable checkpoint is left in {folder}, only {', '.join(remains)}: refusing to start from scratch. Put a"
        " sound copy back as step-N, give another output_path, or start anew with resume_step 0"
    )


class CheckpointMismatchError(ValueError):
    """A sound checkpoint of another run, model or configuration than the one at hand."""

    def __init__(self, message: str, differences: "Sequence[Difference]" = ()):
        super().__init__("\n  ".join([message, *map(str, differences)]))
        self.differences = tuple(differences)


@dataclass(frozen=True)
class Difference:
    """One field or leaf in which two things differ."""

    name: str
    """Its dotted name."""
    stored: str | None
    """The checkpoint's value; None if it has none."""
    wanted: str | None
    """The other's value; None if it has none."""
    note: str = ""
    """What that means, in words."""

    @override
    def __str__(self) -> str:
        return f"{self.name}: stored {self.stored}, wanted {self.wanted}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class LeafRecord:
    """One stored array."""

    shape: tuple[int, ...]
    """Its shape; of a random key, the shape of its words."""
    dtype: str
    """Its type, as JAX names it."""
    key_impl: str | None
    """The generator, if it is a random key."""
    digest: str = ""
    """16 hexadecimal digits, see `grug_native.checkpoint.digest`; empty in what is wanted of a checkpoint."""

    @override
    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}" + (f" ({self.key_impl} key)" if self.key_impl else "")


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, as far as resuming it is concerned."""

    run_id: str
    """The run's name; nothing that carries another run's name is ever deleted."""
    config: Mapping[str, Any]
    """The whole resolved configuration as plain JSON data."""
    data_fingerprint: str
    """Of the training data: the same batch at every step if, and only if, equal."""
    tokenizer_digest: str
    """Of the tokenizer's file."""
    mesh: Mapping[str, int]
    """Sizes of the mesh axes; recorded, and free to change on resume."""
    cosmetic: Sequence[str] = ()
    """Dotted configuration fields, or whole sections, that do not change the mathematics, so may change on resume."""
    allowed_changes: Sequence[str] = ()
    """Fields or sections that may change on resume this once; each change is recorded in the metadata's lineage."""
    data: DataRecord | None = None
    """What `data_fingerprint` stands for."""
    known_data: Mapping[str, DataRecord] = field(default_factory=dict[str, DataRecord])
    """What the fingerprints of the run's checkpoints stand for, as far as that is known."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """Everything a checkpoint says about itself. Plain data, JSON in and out."""

    run_id: str
    """The run that wrote it."""
    kind: CheckpointKind
    """Whether it is kept for good."""
    step: int
    """Updates done."""
    data_offset: int
    """Sequences consumed."""
    data_fingerprint: str
    """Of the training data."""
    tokenizer_digest: str
    """Of the tokenizer."""
    config: Mapping[str, Any]
    """The resolved configuration."""
    config_hash: str
    """SHA-256 of `config`."""
    mesh: Mapping[str, int]
    """Sizes of the mesh axes it was written from."""
    versions: Mapping[str, str]
    """Versions of the packages that wrote it, and the `commit` of this one, where it lies in a repository."""
    environment: Mapping[str, str]
    """The variables of `RECORDED_ENVIRONMENT` that were set."""
    saved_at: str
    """UTC, ISO 8601; for people, never used to order checkpoints."""
    skipped_steps: int = 0
    """Of these updates, those that were not finite and changed nothing."""
    lineage: tuple[str, ...] = ()
    """What the run was made of, if not of fresh parameters; and each change that was allowed on a resume, in order."""
    leaves: Mapping[str, LeafRecord] = field(default_factory=dict[str, LeafRecord])
    """The stored arrays by dotted path in the train state; filled in once they have been digested."""
    format_version: int = FORMAT_VERSION
    """Of this file."""


def describe(
    identity: RunIdentity,
    kind: CheckpointKind,
    *,
    step: int,
    data_offset: int,
    skipped_steps: int = 0,
    lineage: tuple[str, ...] = (),
) -> CheckpointMetadata:
    """Returns what a checkpoint of the run `identity` says about itself, but for its leaves."""
    commit = code_commit()
    return CheckpointMetadata(
        run_id=identity.run_id,
        kind=kind,
        step=step,
        data_offset=data_offset,
        skipped_steps=skipped_steps,
        data_fingerprint=identity.data_fingerprint,
        tokenizer_digest=identity.tokenizer_digest,
        config=identity.config,
        config_hash=canonical_hash(identity.config),
        mesh=identity.mesh,
        versions={name: version(name) for name in _RECORDED_PACKAGES} | ({"commit": commit} if commit else {}),
        environment={name: os.environ[name] for name in RECORDED_ENVIRONMENT if name in os.environ},
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        lineage=lineage,
    )


def canonical_hash(data: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of plain JSON data, whatever the order of its keys."""
    return hashlib.sha256(_canonical(data).encode()).hexdigest()


def _canonical(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def encode_metadata(metadata: CheckpointMetadata) -> str:
    """Returns the text of the file."""
    body = asdict(metadata)
    return json.dumps({"sha256": canonical_hash(body), "metadata": body}, indent=1)


def write_metadata(folder: Path, metadata: CheckpointMetadata) -> None:
    """Writes the metadata of the checkpoint in `folder`, replacing any that is there in one durable step."""
    new = folder / f"{METADATA_FILE}.new"
    new.write_text(encode_metadata(metadata))
    fsync(new)
    os.replace(new, folder / METADATA_FILE)
    fsync(folder)


def read_metadata(folder: Path) -> CheckpointMetadata:
    """Reads the metadata of the checkpoint in `folder`.

    Raises:
        DamagedCheckpointError: It is missing, or not what was written.
        CheckpointError: It cannot be read here and now, for want of a permission or of memory.
        CheckpointMismatchError: A newer version of this package wrote it.
    """
    path = folder / METADATA_FILE
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise DamagedCheckpointError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
        return decode_metadata(path.read_bytes(), path)
    except OSError as error:
        kind = DamagedCheckpointError if error.errno in _DAMAGE else CheckpointError
        raise kind(f"{path} cannot be read: {error!r}") from error


def decode_metadata(data: bytes, path: Path | str) -> CheckpointMetadata:
    """Reads the bytes of the file at `path`; raises as `read_metadata`."""
    try:
        file = json.loads(data.decode())
        body, wanted = file["metadata"], file["sha256"]
        found = canonical_hash(body)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error!r}") from error
    if found != wanted:
        raise DamagedCheckpointError(f"{path} has SHA-256 {found}, and {wanted} was written")
    version = body["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointMismatchError(
            f"{path} has format_version={version}, and this version reads {FORMAT_VERSION}: use the grug-native that"
            f" wrote it ({body['versions'].get('grug-native', 'unknown')})"
        )
    leaves = {
        name: LeafRecord(tuple(leaf["shape"]), leaf["dtype"], leaf["key_impl"], leaf["digest"])
        for name, leaf in body["leaves"].items()
    }
    fields: dict[str, Any] = {**body, "lineage": tuple(body["lineage"]), "leaves": leaves}
    return CheckpointMetadata(**fields)


def config_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Difference]:
    """Returns the fields, by dotted name, in which two configurations differ."""
    return _differences(
        {name: json.dumps(value) for name, value in _flatten(stored)},
        {name: json.dumps(value) for name, value in _flatten(wanted)},
    )


def leaf_differences(stored: Mapping[str, LeafRecord], wanted: Mapping[str, LeafRecord]) -> list[Difference]:
    """Returns the leaves whose presence, shape, type or key generator differ; digests are not compared."""
    return _differences({k: str(v) for k, v in stored.items()}, {k: str(v) for k, v in wanted.items()})


def check_identity(metadata: CheckpointMetadata, identity: RunIdentity) -> tuple[str, ...]:
    """Checks that the run of `metadata` may be continued as the run of `identity`.

    Returns:
        The lineage to record from here on: the checkpoint's, and the changes allowed now.

    Raises:
        CheckpointMismatchError: A field that changes the mathematics differs, and is not among the allowed changes; or
            the tokenizer of trained parameters does, which no one can allow.
    """
    found = [d for d in _identity_differences(metadata, identity) if not _covered(d.name, identity.cosmetic)]
    never = ["tokenizer_digest"] if metadata.step > 0 else []
    refused = [d for d in found if d.name in never or not _covered(d.name, identity.allowed_changes)]
    if refused:
        if any(d.name in never for d in refused):
            way_out = (
                "put them back, or give another output_path. The tokenizer cannot change under trained parameters, for"
                " which its ids would mean other tokens: give that of the run in data.tokenizer:"
            )
        else:
            every = ", ".join([*identity.allowed_changes, *(d.name for d in refused)])
            way_out = (
                "put them back, give another output_path, or, if the state keeps its arrays, resume with"
                f" {offer('trainer.allow_changes', f'[{every}]')}:"
            )
        raise CheckpointMismatchError(
            f"step {metadata.step} of run {metadata.run_id!r} was written with other settings, which change the"
            f" results; {way_out}",
            refused,
        )
    return metadata.lineage + tuple(f"step {metadata.step}: {d}" for d in found)


def _identity_differences(metadata: CheckpointMetadata, identity: RunIdentity) -> Iterator[Difference]:
    for name in ("run_id", "data_fingerprint", "tokenizer_digest"):
        stored, wanted = getattr(metadata, name), getattr(identity, name)
        if stored == wanted:
            continue
        if name == "run_id":
            yield Difference(name, stored, wanted)
            continue
        of_data = name == "data_fingerprint"
        note = explain_change(identity.known_data.get(stored), identity.data) if of_data else ""
        yield Difference(name, stored[:_SHOWN_DIGITS], wanted[:_SHOWN_DIGITS], note)
    yield from config_differences(upgraded(metadata.config), identity.config)


def _covered(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _differences(stored: Mapping[str, str], wanted: Mapping[str, str]) -> list[Difference]:
    names = dict.fromkeys([*stored, *wanted])
    return [Difference(n, stored.get(n), wanted.get(n)) for n in names if stored.get(n) != wanted.get(n)]
