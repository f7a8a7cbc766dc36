"""A run's folder on a POSIX disk: names, the lock, and deletion that survives being killed halfway.

Names under `checkpoints/`:

- `step-N`: committed and verified. Nothing else is ever loaded.
- `.saving-RUN_ID-step-N`: being written, or left by a kill; removed at the next start.
- `.trash-RUN_ID-step-N`: being deleted, or left by a kill; removed at the next start.
- `.corrupt-step-N`, `.abandoned-step-N`: damaged, or stepped back over. Kept until a person removes them.
"""

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import socket
import sys
import unicodedata
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from grug_native.host.fault_injection import fault_point

CONFIG_FILE = "config.yaml"
"""Name of the resolved config in the folder of a run."""

RESULTS_FILE = "speedrun_results.json"
"""Name of a finished run's results in its folder."""

CHECKPOINTS_FOLDER = "checkpoints"
"""Where in a run's folder its checkpoints are."""

RUN_ID_BYTES = 180
"""A run's name has so many at most, in UTF-8: with what is added to it in names of files, 255."""

_NO_NAME = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, halves of surrogate pairs, and separators of lines."""
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_NAMED_STEPS = 10
"""An error names so many checkpoints."""
_BUCKETS = ("gs://", "s3://")
_SPARE_CHECKPOINTS = 1.2
"""Beside those that are kept: the one that is being written, and a margin."""


class RunLockedError(RuntimeError):
    """Another process (or another checkpointer of this one) is writing to the run's folder."""


def validate_run_id(run_id: str) -> str:
    """Returns `run_id` if it is safe as a part of a file name; letters of any script are.

    Raises:
        ValueError: It is empty or too long, starts with what hides a file or marks an option, or holds a separator or a
            control character.
    """
    if run_id_from(run_id) != run_id:
        raise ValueError(
            f"trainer.run_id={run_id!r} must be 1 to {RUN_ID_BYTES} bytes of text in UTF-8 without '/', '\\', '%' and "
            "control characters, not starting with '.' or '-' nor with or before a space; unset, it is the last "
            "part of output_path"
        )
    return run_id


def run_id_from(text: str) -> str:
    """Returns the nearest that a run can be called to `text`; "text" if nothing is left of it."""
    kept = "".join("-" if c in "/\\%" or unicodedata.category(c) in _NO_NAME else c for c in text)
    cut = kept.lstrip(".- ").encode()[:RUN_ID_BYTES].decode(errors="ignore")
    return cut.rstrip() or "text"


def run_folder(base: Path, run_id: str) -> Path:
    """Returns `base/run_id`, resolved.

    Raises:
        ValueError: `run_id` is not a valid name, or a link leads the folder out of `base`.
    """
    root = local_path(str(base))
    folder = (root / validate_run_id(run_id)).resolve()
    if folder.parent != root:
        raise ValueError(f"run_id={run_id!r} leads to {folder}, outside of {root}")
    return folder


def is_bucket(output_path: str | Path) -> bool:
    """Whether a run's place is a URL of an object store, `gs://BUCKET/FOLDER` or `s3://BUCKET/FOLDER`."""
    return isinstance(output_path, str) and output_path.startswith(_BUCKETS)


def local_path(output_path: str) -> Path:
    """Returns `output_path` as an absolute path of this machine.

    Raises:
        ValueError: It is empty, has a NUL byte, or is a URL: the lock and the renames need a POSIX file system.
    """
    if not output_path or "\0" in output_path or "://" in output_path:
        raise ValueError(
            f"output_path={output_path!r} must be a folder of a POSIX file system, mounted on this machine, or of a"
            " bucket, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
        )
    return Path(output_path).resolve()


def step_name(step: int) -> str:
    """Returns the folder name of a committed step."""
    return f"step-{step}"


def saving_name(run_id: str, step: int) -> str:
    """Returns the folder name of a step that is being written."""
    return f".saving-{run_id}-step-{step}"


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _holds_something(path: Path) -> bool:
    with suppress(FileNotFoundError):  # deleted since it was listed, by the run that owns it
        return _is_real_folder(path) and any(path.iterdir())
    return False


def committed_steps(folder: Path) -> list[int]:
    """Returns the steps of the `step-N` folders in `folder`, newest first; links, files and empty folders are none."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted((int(match[1]) for match, path in found if _holds_something(path)), reverse=True)


def find_checkpoint(folder: Path, step: int | None) -> Path:
    """Returns the folder of a checkpoint.

    Args:
        folder: A run's `checkpoints/`.
        step: Which; None takes the newest.

    Raises:
        ValueError: There is none.
    """
    steps = committed_steps(folder)
    if not steps:
        raise ValueError(f"{folder} holds no checkpoint: train the run first, or give the folder of one that has")
    if step is not None and step not in steps:
        more = f" and {len(steps) - _NAMED_STEPS} older ones" if len(steps) > _NAMED_STEPS else ""
        named = ", ".join(map(str, steps[:_NAMED_STEPS]))
        raise ValueError(f"{folder} holds no checkpoint of step {step}: there are {named}{more}")
    return folder / step_name(steps[0] if step is None else step)


def quarantined(folder: Path) -> list[Path]:
    """Returns the `.corrupt-*` folders in `folder`."""
    return sorted(folder.glob(".corrupt-*")) if folder.is_dir() else []


def set_aside(path: Path, label: str) -> Path:
    """Renames `path` to a free `.{label}-{name}` beside it, which no cleaning touches; returns the new path."""
    names = itertools.chain([f".{label}-{path.name}"], (f".{label}-{path.name}-{n}" for n in itertools.count(2)))
    target = next(target for name in names if not os.path.lexists(target := path.with_name(name)))
    path.rename(target)
    fsync(path.parent)
    return target


def discard(path: Path, run_id: str) -> None:
    """Deletes the checkpoint at `path`: renamed out of sight first, so that a kill never leaves half of a `step-N`."""
    trash = path.with_name(f".trash-{run_id}-{path.name}")
    path.rename(trash)
    fsync(path.parent)
    fault_point("mid_gc", int(path.name.removeprefix("step-")))
    shutil.rmtree(trash)


def _leftover(run_id: str) -> re.Pattern[str]:
    return re.compile(rf"\.(saving|trash)-{re.escape(run_id)}-{_STEP.pattern}(\.orbax-checkpoint-tmp(-[0-9]+)?)?")


def sweep_leftovers(folder: Path, run_id: str) -> list[str]:
    """Removes what a killed process of this run left half-written or half-deleted in `folder`; call it under the lock.

    Only real folders whose name carries this very run id are removed; links are neither followed nor removed.

    Returns:
        The names that were removed.
    """
    leftovers = [p for p in folder.iterdir() if _leftover(run_id).fullmatch(p.name) and _is_real_folder(p)]
    for path in leftovers:
        shutil.rmtree(path)
    return sorted(path.name for path in leftovers)


def fsync(path: Path, *, forget: bool = False) -> None:
    """Makes the bytes of a file, or the names in a folder, survive a power loss; with `forget`, uncaches them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget and sys.platform == "linux":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def settle_tree(path: Path) -> None:
    """Makes every file and folder under `path` survive a power loss, and lets go of the memory that caches the files.

    So whoever reads them next reads the disk, and not what should be on it.
    """
    for root, _, files in os.walk(path):
        for name in files:
            fsync(Path(root) / name, forget=True)
        fsync(Path(root))


def check_disk(folder: Path, checkpoint_bytes: int, *, kept: int) -> None:
    """Checks, before anything is compiled, that checkpoints of `checkpoint_bytes` bytes can be written into `folder`.

    Raises:
        OSError: `folder` cannot be written to, or its disk has no room for the `kept` newest checkpoints, less those
            that are there, the one that is being written, and a margin.
    """
    probe = folder / ".probe"
    try:
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot write checkpoints: {error.strerror}", str(folder)) from error
    wanted = max(kept - len(committed_steps(folder)), 0) + _SPARE_CHECKPOINTS
    free, needed = shutil.disk_usage(folder).free, int(wanted * checkpoint_bytes)
    if free < needed:
        message = (
            f"{free} bytes are free, and {wanted} checkpoints need {needed}: free some space, change output_path, or "
            "lower trainer.keep_last_checkpoints"
        )
        raise OSError(errno.ENOSPC, message, str(folder))


@dataclass(frozen=True)
class LockOwner:
    """Who holds a run's folder."""

    run_id: str
    """The run's name."""
    pid: int
    """The holder's process id on `host`."""
    host: str
    """The holder's machine."""
    since: str
    """When it was taken, UTC, ISO 8601."""


class RunLock:
    """The exclusive right to write into a run's folder; the kernel takes it back however the process ends.

    It is `flock` on `folder/.lock`, which holds the owner's name for whoever is refused.
    """

    def __init__(self, folder: Path, run_id: str):
        """Takes the lock.

        Raises:
            RunLockedError: Someone holds it.
        """
        path = folder / ".lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace")
            os.close(descriptor)
            raise RunLockedError(
                f"{folder} is being written to by {owner}; wait for it, stop it, or give another output_path"
            ) from None
        owner = LockOwner(run_id, os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)
        self._file = os.fdopen(descriptor, "r+b")

    def release(self) -> None:
        """Gives the lock back; doing so twice is harmless."""
        self._file.close()
