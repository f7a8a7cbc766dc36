"""What surrounds the making of a corpus: a hidden folder that no kill leaves for ever, Ctrl-C at any time, progress."""

import atexit
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import final

from grug_native.host.process import tidied_at_ctrl_c
from grug_native.host.run_folder import RunLock, RunLockedError

_SCRATCH = re.compile(r"\.[0-9a-f]{16}-[a-z0-9_]{8}")
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_LOOKS = 0.2

logger = logging.getLogger(__name__)


@contextmanager
def scratch_folder(corpora: Path, key: str) -> Generator[Path]:
    """Makes a hidden folder in `corpora`, locked as long as this process works in it, and removes it at the end."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=corpora, prefix=f".{key}-"))
        try:
            lock = RunLock(folder, key)
        except (RunLockedError, FileNotFoundError):
            continue  # Another process has swept it, which had no lock yet.
        if (folder / ".lock").exists():
            break
        lock.release()
    try:
        with tidied_at_ctrl_c(partial(_remove, folder)):
            yield folder
    finally:
        shutil.rmtree(folder)
        lock.release()


def _remove(folder: Path) -> None:
    """Until it is gone: a thread of a library may still write into it."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def check_place(corpora: Path) -> None:
    """Refuses, before texts are read for long, a folder for corpora that cannot be written to, with an `OSError`."""
    place = next(folder for folder in (corpora.absolute(), *corpora.absolute().parents) if folder.is_dir())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        message = f"no corpus can be made there ({error.strerror}): start from a folder that can be written to"
        raise OSError(error.errno, message, str(corpora)) from error


@contextmanager
def full_disk_told(corpora: Path) -> Generator[None]:
    """Makes one `OSError`, with the way out, of what libraries and processes say of a full disk."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                way_out = "what was made of the corpus is removed; free some space, and run the same command again"
                raise OSError(number, f"{os.strerror(number)}: {way_out}", str(corpora)) from error
        raise


def sweep_scratch(corpora: Path) -> None:
    """Removes the hidden folders in `corpora` which killed processes have left; those of living ones are locked."""
    for folder in sorted(corpora.iterdir()) if corpora.is_dir() else ():
        if not _SCRATCH.fullmatch(folder.name) or folder.is_symlink():
            continue
        try:
            lock = RunLock(folder, "sweep")
        except (RunLockedError, OSError):
            continue  # Somebody works in it, or it is another user's, or it has just gone.
        shutil.rmtree(folder)
        lock.release()
        logger.info("removed %s, which a killed process had left", folder)


@final
class Heartbeat:
    """Says every ten seconds how far a long phase is."""

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._last = time.monotonic()

    def beat(self, how_far: str) -> None:
        """Logs the phase and how far it is, if it is time."""
        if time.monotonic() >= self._last + _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            logger.info("%s: %s", self._phase, how_far)


def run_module(arguments: Sequence[str], phase: str) -> None:
    """Runs a module of Python in a process of its own, which ends with this one, and at Ctrl-C.

    Args:
        arguments: name of the module, and what it is given.
        phase: what the log calls it.

    Raises:
        RuntimeError: if it ends otherwise than well.
    """
    heartbeat, start = Heartbeat(phase), time.monotonic()
    # It finds what this process has found, and nothing in the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", *arguments]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors, env=environment, process_group=0) as child,
    ):
        try:
            while child.poll() is None:
                try:
                    child.wait(_SECONDS_BETWEEN_LOOKS)
                except subprocess.TimeoutExpired:
                    heartbeat.beat(f"{time.monotonic() - start:.0f} s so far")
        except BaseException:
            child.kill()
            child.wait()
            raise
        if child.returncode != 0:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            killed = f"killed by signal {-child.returncode}; the machine's memory may be too small"
            raise RuntimeError(f"{phase} failed: {said or killed}")


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the one that started it ends, however that ends; on Linux.

    Args:
        parent: its process id.
    """
    if sys.platform == "linux":
        import ctypes

        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this one has ended")


def interruptible[Result](work: Callable[[], Result]) -> Result:
    """Does work that may be deep in foreign code for long, so that Ctrl-C is heard meanwhile."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - it is raised again where it belongs
            errors.append(error)

    thread = threading.Thread(target=run, name="grug-corpus", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_SECONDS_BETWEEN_LOOKS)
    except BaseException:
        atexit.register(_leave_at_once, thread)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _leave_at_once(thread: threading.Thread) -> None:
    """Foreign code that comes back to an interpreter which is ending would abort the process."""
    if thread.is_alive():
        os._exit(130)
