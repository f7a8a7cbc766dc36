"""What a run says while it runs: its log messages, and the progress line."""

import logging
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import ClassVar, final, override

import psutil
from tqdm.auto import tqdm

from grug_native.data.corpus_store import seconds_spent
from grug_native.host.streams import make_streams_last

_SECONDS_BETWEEN_LINES = 10.0
_CHATTY = "levanter.data.loader"
"""It warns of each batch that is not there at once; what the loop waits for is in the metrics."""
_SMOOTHING = 0.9
"""Weight of the past in the step time that is shown, per step."""

logger = logging.getLogger(__name__)


@final
class MessageHandler(logging.Handler):
    """Writes log messages to stderr, above a progress bar if there is one.

    Ours are told with the time alone; those of other packages with their origin, so that they can be told apart.
    """

    def __init__(self) -> None:
        """Takes its format from nobody."""
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))

    @override
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(format_message(self, record), file=sys.stderr)


def format_message(handler: logging.Handler, record: logging.LogRecord) -> str:
    """A message as it is shown: with where it comes from, if that is another package."""
    text = handler.format(record)
    if record.name.partition(".")[0] in ("grug_native", "__main__"):
        return text
    return f"{text} [{record.levelname.lower()} of {record.name}]"


def configure_logging() -> None:
    """Shows what this package has to say from INFO on, and what anyone else has from WARNING on, on stderr.

    The program outlives whoever reads that, and its output.
    """
    make_streams_last()
    logging.basicConfig(level=logging.WARNING, handlers=[MessageHandler()])
    logging.getLogger("grug_native").setLevel(logging.INFO)
    logging.getLogger(_CHATTY).setLevel(logging.ERROR)


@contextmanager
def messages_shown() -> Generator[None]:
    """Shows this package's messages for a while, where nobody has set logging up: in a notebook, or a plain script."""
    package, chatty, root = (logging.getLogger(name) for name in ("grug_native", _CHATTY, None))
    # Importing orbax is enough to give the root a plain handler.
    untouched = all(type(handler) is logging.StreamHandler for handler in root.handlers)
    if not untouched or package.handlers or package.level != logging.NOTSET or package.isEnabledFor(logging.INFO):
        yield
        return
    handler, levels = MessageHandler(), (package.level, chatty.level)
    package.addHandler(handler)
    package.propagate = False
    package.setLevel(logging.INFO)
    chatty.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.propagate = True
        package.setLevel(levels[0])
        chatty.setLevel(levels[1])


@final
class StartUp:
    """Where the time from the start of the process to the first step goes."""

    _first: ClassVar[bool] = True

    def __init__(self) -> None:
        """Begins at the start of the training; what was before it is imports, and making a corpus.

        Not so in a session, whose age says how long its user has been thinking, nor in the second run of a process.
        """
        self._data = 0.0
        self._imports = 0.0
        if StartUp._first and not hasattr(sys, "ps1"):
            StartUp._first = False
            self._data = seconds_spent()
            self._imports = max(0.0, time.time() - psutil.Process().create_time() - self._data)
        self._before = self._imports + self._data
        self._begun = time.perf_counter()

    @contextmanager
    def data(self) -> Generator[None]:
        """Counts what happens in it as time for data."""
        started = time.perf_counter()
        yield
        self._data += time.perf_counter() - started

    def report(self, *, evaluation: float, compilation: float) -> None:
        """Logs the parts, of which two are given, in seconds; what remains is planning and looking for checkpoints."""
        total = self._before + time.perf_counter() - self._begun
        parts = {"import": self._imports, "data": self._data, "evaluation": evaluation, "compile": compilation}
        parts["other"] = max(0.0, total - math.fsum(parts.values()))
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if name != "import" or seconds)
        logger.info("first step after %.1f s: %s", total, shown)


@final
class ProgressLine:
    """Step, percentage, loss, learning rate, tokens per second, MFU where it is known, memory, and time left.

    A bar in a terminal or a notebook; elsewhere (nohup, a pipe, CI) a line of the log every ten seconds. Beside a bar,
    a note of it is taken as often.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        start_step: int = 0,
        bar: bool | None = None,
        note: Callable[[str], object] = lambda _: None,
    ):
        """Begins the line.

        Args:
            num_steps: Steps of the whole run.
            start_step: Steps that were done before, in the run that this one resumes.
            bar: Show a bar; None does where one can be seen.
            note: Takes the line where it is shown as a bar.
        """
        if bar is None:
            bar = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._bar = None
        if bar:
            shape = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=num_steps, initial=start_step, bar_format=shape, dynamic_ncols=True)
        self._note = note
        self._num_steps = num_steps
        self._start = self._done = start_step
        self._text = ""
        self._seconds: float | None = None
        self._last_line = -_SECONDS_BETWEEN_LINES

    def update(
        self, steps_done: int, *, loss: float, learning_rate: float, throughput: Mapping[str, float], memory: int
    ) -> None:
        """Brings the line up to date; cheap enough for every step.

        Args:
            steps_done: Steps of the whole run that are done.
            loss: Nats per token.
            learning_rate: Of the step just done.
            throughput: The step's `throughput/*` metrics. Those of the first step, which is compiled on the way, say
                nothing about the next ones and are left out.
            memory: Bytes in use.
        """
        parts = [f"loss {loss:.4g}", f"lr {learning_rate:.2e}"]
        left = ""
        if steps_done > self._start + 1:
            duration = throughput["throughput/duration"]
            past = duration if self._seconds is None else self._seconds
            self._seconds = _SMOOTHING * past + (1 - _SMOOTHING) * duration
            faster = duration / self._seconds
            parts.append(f"{faster * throughput['throughput/tokens_per_second']:,.0f} tokens/s")
            if "throughput/mfu" in throughput:
                parts.append(f"{faster * throughput['throughput/mfu']:.1f}% MFU")
            left = f"{tqdm.format_interval((self._num_steps - steps_done) * self._seconds)} left"
        parts.append(f"{memory / 2**30:.1f} GiB")
        self._text = ", ".join([*parts, left] if left else parts)
        if self._bar is not None:
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(steps_done - self._done)
        self._done = steps_done
        if time.monotonic() >= self._last_line + _SECONDS_BETWEEN_LINES:
            self._log_line()

    def close(self) -> None:
        """Shows the last state and ends the line."""
        if self._bar is not None:
            self._bar.close()
        if self._text:
            self._log_line()

    def _log_line(self) -> None:
        done, steps = self._done, self._num_steps
        line = f"step {done}/{steps} ({100 * done / steps:.1f}%): {self._text}"
        if self._bar is None:
            logger.info("%s", line)
        else:
            self._note(line)
        self._last_line, self._text = time.monotonic(), ""
