"""What a run says, kept in its folder too: the terminal is not there for ever."""

import io
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import final, override

from grug_native.tracking.progress import format_message

LOG_FILE = "log.txt"
"""Name of the log in the folder of a run."""

type Publish = Callable[[str, Path, BaseException | None], None]
"""Is given a file's name in the run, the file, and the error that has ended the run, if one has."""

logger = logging.getLogger(__name__)


@final
class RunLog(logging.Handler):
    """Appends to `log.txt` what this package says, what others warn of, and the error that ends the run.

    Until `keep` has told where, messages wait: whose folder it is, is known only once its lock is held.
    """

    def __init__(self) -> None:
        """Takes its format from nobody."""
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        self._waiting: list[str] = []
        self._file: io.FileIO | None = None
        self._publish: Publish | None = None
        self._lost = False
        self._loggers = (logging.getLogger("grug_native"), logging.getLogger())

    def __enter__(self) -> "RunLog":
        for source in self._loggers:
            source.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for source in self._loggers:
            source.removeHandler(self)
        if error is not None and not isinstance(error, SystemExit):
            self._write("".join(traceback.format_exception(error)))
        if self._file is not None:
            self._file.close()
            if self._publish is not None:
                self._publish(LOG_FILE, Path(str(self._file.name)), error)

    def keep(self, folder: Path, publish: Publish | None = None) -> None:
        """Writes to the log in `folder` from here on, after what has been said so far.

        Args:
            folder: of the run on this machine.
            publish: what becomes of the file at the end.
        """
        self._publish = publish
        self._file = (folder / LOG_FILE).open("ab", buffering=0)
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            self._write(text)

    def note(self, line: str) -> None:
        """Keeps a line that is said to nobody else."""
        self.emit(logging.LogRecord(__name__, logging.INFO, "", 0, line, None, None))

    @override
    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.partition(".")[0] == "grug_native"
        if ours or record.levelno >= logging.WARNING:
            self._write(format_message(self, record))

    @override
    def handle(self, record: logging.LogRecord) -> bool:
        # A message of this package may come by twice: from its own logger, and from the root that it is passed on to.
        if getattr(record, "in_run_log", None) is self:
            return True
        record.in_run_log = self
        return bool(super().handle(record))

    def _write(self, text: str) -> None:
        if self._lost:
            return
        if self._file is None:
            self._waiting.append(text)
            return
        try:
            self._file.write(f"{text.rstrip()}\n".encode(errors="backslashreplace"))
        except OSError as error:
            file, self._lost = self._file, True
            logger.warning("%s cannot be written to, the run goes on without it: %s", file.name, error)
