"""The worker's end of a comparison: a loop runs as many steps as the parent asks for, and is held in between.

The parent writes a number of steps on a line of stdin; the worker takes them and answers with one line of JSON, a
`Turn`. While it waits for the next line it is blocked in a read, and nothing of it is in flight, so that only one
contender works at a time. The first step is taken unasked. Standard library only: torch's interpreter runs it too.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a worker did between two waits."""

    seconds: float
    """From the end of the wait until all its steps were done, on the device too."""
    steps: list[float]
    """Seconds between the ends of its steps, as the host saw them."""
    values: list[float]
    """Loss of each step."""
    calls: list[float]
    """Seconds which the contender's own measure gives for each step: see its module."""
    finished_at: float
    """`time.time()` at the end."""
    peak_rss: int
    """Bytes: the most that the process had resident so far."""
    peak_device: int | None
    """Bytes: the most that its arrays took on the device so far; None on a CPU."""
    about: dict[str, str] = field(default_factory=dict[str, str])
    """Platform, device, versions."""

    @property
    def step(self) -> float:
        """Seconds a step; of several, the first is left out: the system takes freed pages away from who waits."""
        first = self.steps[0] if len(self.steps) > 1 else 0.0
        return (self.seconds - first) / max(len(self.steps) - 1, 1)


class Gate:
    """Lets a training loop pass step by step, and holds it when the steps that were asked for are done."""

    def __init__(self, settle: Callable[[], None], peak_device: Callable[[], int | None], about: dict[str, str]):
        """Takes stdout: what others print goes to stderr from now on.

        Args:
            settle: waits until nothing is in flight.
            peak_device: see `Turn`.
            about: see `Turn`.
        """
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._settle, self._peak_device, self._about = settle, peak_device, about
        self._left = 1
        self._begin()

    def step_done(self, value: object, call: float) -> None:
        """To be called after each step; returns when the next one may begin, or ends the process.

        Args:
            value: the loss, or an array that will be read when the turn is over.
            call: seconds, see `Turn.calls`.
        """
        if not self._steps and self._left > 1:
            self._settle()  # so that it can be told apart from the rest, and left out
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._values.append(value)
        self._calls.append(call)
        self._last = now
        self._left -= 1
        if self._left > 0:
            return
        self._settle()
        turn = Turn(
            seconds=time.perf_counter() - self._resumed,
            steps=self._steps,
            values=[float(value) for value in self._values],  # pyright: ignore[reportArgumentType]  # any array
            calls=self._calls,
            finished_at=time.time(),
            peak_rss=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            peak_device=self._peak_device(),
            about=self._about,
        )
        print(json.dumps(asdict(turn)), file=self._out, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            # The loops have no end of their own, and threads that would keep the process alive.
            os._exit(0)
        self._left = int(line)
        self._begin()

    def _begin(self) -> None:
        self._steps: list[float] = []
        self._values: list[object] = []
        self._calls: list[float] = []
        self._resumed = self._last = time.perf_counter()
