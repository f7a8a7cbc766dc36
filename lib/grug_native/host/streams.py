"""The terminal, or the pipe in its place, may go away; a run outlives it.

A write to a pipe that nobody reads, a closed terminal or a full disk raises an `OSError` wherever it happens to be
made: in a log message, a progress bar, a library's warning.
"""

import atexit
import io
import logging
import os
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, final

logger = logging.getLogger(__name__)


@final
class LastingStream:
    """A stream of text that never fails: once a write has, it leads nowhere, and so does its file descriptor."""

    def __init__(self, stream: io.TextIOWrapper, name: str):
        """Wraps a stream that has a file descriptor; `name` is what a message calls it."""
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        """Writes, or does as if."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes lines, or does as if."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hands on what has been written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # Also for what is in the stream's buffer still, for other threads, and for native code.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        logger.warning("%s is gone (%s): what is said goes on in the run's log.txt alone", self._name, error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_streams_last() -> None:
    """Makes `sys.stdout` and `sys.stderr` outlive whoever reads them, until the process ends."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # The process was started with that descriptor closed.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, LastingStream(stream, name))
    # What fails only as the interpreter ends would turn the exit code into 120.
    atexit.unregister(_flush)
    atexit.register(_flush)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LastingStream):
            stream.flush()


@contextmanager
def lasting_streams() -> Generator[None]:
    """Makes `sys.stdout` and `sys.stderr` outlive whoever reads them, for a while."""
    before = sys.stdout, sys.stderr
    make_streams_last()
    try:
        yield
    finally:
        _flush()
        sys.stdout, sys.stderr = before
