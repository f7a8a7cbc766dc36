"""A profile of some steps of a run: jax's own trace, for Perfetto and TensorBoard, and a table of its dearest kernels.

The trace is `plugins/profile/TIME/` in the profile's folder. TensorBoard's profile plug-in reads that folder, and
Perfetto (ui.perfetto.dev) the `.trace.json.gz` in it.
"""

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple, final

import jax
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation, TraceAnnotation

logger = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
"""In the run's folder: `profile/step-N` for a profile that begins at step N."""
TABLE_FILE = "profile.txt"
"""The table of the dearest kernels, in the profile's folder."""

type Part = Literal["data", "step", "log"]
"""What the host does in a step: wait for the batch, dispatch, log the step before (and wait for the devices)."""

_PARTS: tuple[Part, ...] = ("data", "step", "log")


def profile_window(asked: str | None, num_steps: int) -> range:
    """The steps that `trainer.profile` asks for, none for None.

    Raises:
        ValueError: if it is not `START:STEPS`, or not within the run's `num_steps`.
    """
    if asked is None:
        return range(0)
    found = re.fullmatch(r"(-?\d+):(-?\d+)", asked.strip())
    if found is None:
        raise ValueError(f"trainer.profile={asked!r} must be START:STEPS, as in 20:5 for five steps from step 20 on")
    start, steps = int(found[1]), int(found[2])
    if start < 0 or steps <= 0:
        raise ValueError(
            f"trainer.profile={asked!r}: START must not be negative, and STEPS must be positive, as in 20:5"
        )
    if start + steps > num_steps:
        raise ValueError(
            f"trainer.profile={asked!r} ends after step {start + steps}, and the run after trainer.num_train_steps="
            f"{num_steps}: begin earlier, or profile fewer steps"
        )
    return range(start, start + steps)


class Kernel(NamedTuple):
    """All calls of one kernel in a trace, on all devices; instances that differ in a number at their end are one."""

    name: str
    """As XLA or the library calls it."""
    calls: int
    """On all devices together."""
    seconds: float
    """Of all calls together."""


class Trace(NamedTuple):
    """What a trace says of where the time went."""

    kernels: tuple[Kernel, ...]
    """The dearest first."""
    parts: dict[str, float]
    """Seconds of the host's parts of the steps, over all steps."""


@final
class StepProfile:
    """Traces a window of a run's steps on the first process; elsewhere, and without a window, it does nothing."""

    def __init__(self, window: range, folder: Path, *, start_step: int):
        """Prepares; nothing is traced yet.

        Args:
            window: steps to trace; those before `start_step` are left out.
            folder: of the run.
            start_step: the first step that is going to be taken.
        """
        if window and start_step >= window.stop:
            logger.warning(
                "nothing is profiled: trainer.profile=%d:%d lies before step %d", window.start, len(window), start_step
            )
        self._window = range(max(window.start, start_step), window.stop)
        self._run = folder
        self._trace: ExitStack | None = None
        self._first = self._done = 0
        self._step: AbstractContextManager[object] = nullcontext()

    def turns_at(self, step: int) -> bool:
        """Whether `turn` begins or ends the trace at the boundary before `step`: the devices are to be idle then."""
        return bool(self._window) and step in (self._window.start, self._window.stop)

    def turn(self, step: int) -> None:
        """Begins the trace before `step`, or ends it."""
        if step == self._window.stop:
            self.close()
        elif jax.process_index() == 0:
            self._first = self._done = step
            self._trace = ExitStack()
            self._trace.enter_context(tracing(self.folder))

    @property
    def folder(self) -> Path:
        """Where this profile goes."""
        return self._run / PROFILE_FOLDER / f"step-{self._first}"

    def begin(self, step: int) -> None:
        """Marks where a step begins, if it is traced."""
        if self._trace is not None:
            self._step.__exit__(None, None, None)
            self._step = StepTraceAnnotation("train", step_num=step)
            self._step.__enter__()
            self._done = step + 1

    def part(self, name: Part) -> AbstractContextManager[object]:
        """Marks a part of a step, if it is traced."""
        return _NOTHING if self._trace is None else TraceAnnotation(name)

    def close(self) -> None:
        """Ends the trace if there is one, writes the table of its kernels, and says where they are."""
        if self._trace is None:
            return
        self._step.__exit__(None, None, None)
        self._trace.close()
        self._trace, self._step = None, nullcontext()
        steps = self._done - self._first
        if steps:
            table = f"steps {self._first} to {self._done - 1}\n{kernel_table(read_trace(self.folder), steps)}"
            (self.folder / TABLE_FILE).write_text(table)
            logger.info("profile of %d steps: %s, and a trace beside it", steps, self.folder / TABLE_FILE)


_NOTHING = nullcontext()


@contextmanager
def tracing(folder: Path) -> Generator[None]:
    """Writes jax's trace of what happens inside into a folder; Python's calls are left out, as tracing them is slow."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    folder.mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def read_trace(folder: Path) -> Trace:
    """Sums up the newest trace in a folder.

    On a GPU a kernel is what ran on a stream, on a TPU an operation of XLA, and on a CPU an operation of XLA on any of
    its threads. What runs inside another operation (the body of a loop) counts there and not twice.

    Raises:
        ValueError: if there is none.
    """
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder} holds no trace: there is no plugins/profile/*/*.xplane.pb")
    calls, seconds = defaultdict[str, int](int), defaultdict[str, float](float)
    parts: dict[str, float] = dict.fromkeys(_PARTS, 0.0)
    with warnings.catch_warnings():
        # jaxlib's iterators of events lack a `__module__`, of which Python tells once.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in ProfileData.from_file(str(files[-1])).planes:
            device = plane.name.startswith("/device:")
            lines = list(plane.lines)
            streams = [line for line in lines if line.name.startswith("Stream")]
            for line in streams or lines:
                if device and not streams and line.name != "XLA Ops":
                    continue
                found: list[tuple[float, float, str]] = []
                for event in line.events:
                    if device or any(name == "hlo_op" for name, _ in event.stats):
                        found.append((event.start_ns, event.duration_ns, event.name))
                    elif event.name in parts:
                        parts[event.name] += event.duration_ns * 1e-9
                for name, own in _own_times(found):
                    calls[name] += 1
                    seconds[name] += own * 1e-9
    kernels = (Kernel(name, calls[name], spent) for name, spent in seconds.items())
    return Trace(tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)), parts)


def kernel_table(trace: Trace, steps: int, *, rows: int = 20) -> str:
    """The dearest kernels of a trace as text: milliseconds and calls a step, and the share of all kernels' time."""
    total = sum(kernel.seconds for kernel in trace.kernels)
    host = ", ".join(f"{name} {1e3 * spent / steps:.2f}" for name, spent in trace.parts.items())
    shown = [
        f"{1e3 * seconds / steps:10.3f}  {seconds / total:6.1%}  {calls / steps:7.1f}  {name}"
        for name, calls, seconds in trace.kernels[:rows]
    ]
    return "\n".join(
        [
            *([f"host, ms a step: {host}"] if any(trace.parts.values()) else []),
            f"kernels, all devices and threads: {1e3 * total / steps:.3f} ms a step; the {len(shown)} dearest:",
            f"{'ms a step':>10}  {'share':>6}  {'calls':>7}  kernel",
            *shown,
            "",
        ]
    )


def _own_times(events: list[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Of (start, duration, name) of one line: names without their numbers, and times less those of events inside."""
    own: list[float] = []
    open_events: list[tuple[float, int]] = []
    ordered = sorted(events, key=lambda event: (event[0], -event[1]))
    for index, (start, duration, _) in enumerate(ordered):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events:
            own[open_events[-1][1]] -= duration
        own.append(duration)
        open_events.append((start + duration, index))
    for (_, _, name), spent in zip(ordered, own, strict=True):
        yield re.sub(r"(?<=\w)([._]\d+)+$", "", name), max(spent, 0.0)
