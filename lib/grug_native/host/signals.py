"""Being told to stop: SIGTERM, SIGINT and SIGHUP become a question that the loop asks at each step boundary."""

import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextvars import ContextVar, Token
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from grug_native.host.process import say_soon

logger = logging.getLogger(__name__)


class ExitCode(IntEnum):
    """What the process says when it ends. Told to stop by signal N, it is 128 + N: 130 for SIGINT, 143 for SIGTERM."""

    FINISHED = 0
    """Every step is done, and the last checkpoint is committed."""
    FAILED = 1
    """An error: a line says which, or, where it is not one of those that are documented, a traceback."""
    REFUSED = 2
    """The user's mistake, such as a changed setting on resume: nothing was started."""
    NO_USABLE_CHECKPOINT = 3
    """There are checkpoints, all damaged."""
    LOCKED = 4
    """Another process is writing to the run's folder."""


class StopRequestedError(Exception):
    """Told to stop, in the middle of work that may be left undone."""


def leave_if_told_to_stop() -> None:
    """To be called now and then by work that takes long and can be done again, such as an evaluation.

    Several processes call it equally often.

    Raises:
        StopRequestedError: the `StopSignal` that is entered in this context says to stop.
    """
    entered = _entered.get()
    if entered is not None and entered.should_stop():
        raise StopRequestedError


class StopSignal:
    """While entered, the first SIGTERM or SIGINT is remembered, and another, a second later or more, ends the process.

    SIGHUP is remembered too. But it says that the terminal is gone, and not that someone is in a hurry: it never counts
    as the second one, nor as the one before it. Where it is ignored, as under `nohup`, it stays so.

    What comes sooner is the first one again: `uv run` and others pass on a signal that the whole group has had already.
    A thread watches for signals through a file descriptor that the C-level handler writes to, so a second signal works
    also while the main thread compiles or waits for a device. That thread may be late on a busy machine; so the main
    thread, which is the one that asks, takes note of a signal as well.

    With `jax.distributed` and its preemption service, SIGTERM stays JAX's, which makes all processes stop at the same
    step (a handler of ours would disable that); SIGINT and SIGHUP are passed on to it as SIGTERM, and only a second
    SIGINT ends the process at once.

    Only the main thread may handle signals. Entered from a thread that runs in a copy of the main thread's context, as
    Marin's steps do, it passes on what the main thread's own is told; from any other, it never asks to stop.
    """

    def __init__(self) -> None:
        self.nothing_to_lose = False
        """Whether what has been done is on disk or done anew in no time: then the first signal may end the process at
        once, wherever the main thread is, if it does not ask soon. Never in an interactive session."""
        self._signal: signal.Signals | None = None
        self._agreed = False
        self._synced = jax.distributed.is_initialized() and bool(jax.config.values["jax_enable_preemption_service"])
        self._previous: dict[signal.Signals, Any] = {}
        self._wakeup: socket.socket | None = None
        self._previous_wakeup = -1
        self._watching: threading.Thread | None = None
        self._outer: StopSignal | None = None
        self._reset: Token[StopSignal | None] | None = None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            self._outer = _entered.get()
            return self
        self._reset = _entered.set(self)
        watched, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        handled = [signal.SIGINT] if self._synced else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handled.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._note) for number in handled}
        self._watching = threading.Thread(
            target=self._watch, args=(watched, frozenset(handled)), name="grug-signals", daemon=True
        )
        self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._wakeup is None or self._reset is None or self._watching is None:
            return
        _entered.reset(self._reset)
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        wakeup, self._wakeup = self._wakeup, None
        wakeup.close()
        self._watching.join()  # It reads what came before the end, so a signal at the last moment counts too.

    @property
    def exit_code(self) -> int | None:
        """128 plus the number of the signal that asked to stop; None if none did, or not all processes know yet."""
        if self._outer is not None:
            return self._outer.exit_code
        return None if self._signal is None or (self._synced and not self._agreed) else 128 + self._signal

    def should_stop(self) -> bool:
        """Whether to save and stop. Several processes all ask equally often, and are all told at the same question."""
        if self._outer is not None:
            return self._outer.should_stop()
        asks = self._synced and not self._agreed
        if asks and multihost_utils.reached_preemption_sync_point(next(_questions)):
            self._signal, self._agreed = self._signal or signal.SIGTERM, True
        return self.exit_code is not None

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        """Python's handler too: it keeps Python from raising KeyboardInterrupt in the middle of a step."""
        if self._signal in (None, signal.SIGHUP):
            self._signal = signal.Signals(number)

    def _watch(self, watched: socket.socket, handled: frozenset[signal.Signals]) -> None:
        first, since = None, 0.0
        with watched:
            while numbers := watched.recv(1):
                number = numbers[0]
                if number not in handled:
                    continue
                if first not in (None, signal.SIGHUP):
                    if time.monotonic() - since >= _SECONDS_APART and number != signal.SIGHUP:
                        os._exit(128 + number)
                    continue
                first, since = signal.Signals(number), time.monotonic()
                self._note(first)
                if self._synced:
                    _warn("%s: saving at the next step; a second SIGINT ends this at once", first.name)
                    os.kill(os.getpid(), signal.SIGTERM)
                    continue
                if self.nothing_to_lose and not hasattr(sys, "ps1"):
                    time.sleep(_SECONDS_TO_ASK)
                    if self.nothing_to_lose and self._wakeup is not None:
                        _warn("%s: there is nothing to save yet", first.name)
                        os._exit(128 + first)
                _warn("%s: saving at the next step; another one ends this at once", first.name)


_SECONDS_APART = 1.0
"""Signals that come closer are one."""

_SECONDS_TO_ASK = 0.3
"""With nothing to lose, a main thread that has not asked by then is in foreign code."""

_questions = itertools.count()
"""Never begun anew: JAX agrees on the number of the question at which all processes are told."""

_entered: ContextVar[StopSignal | None] = ContextVar("grug_stop_signal", default=None)


def _warn(message: str, name: str) -> None:
    """Logs a message. What the main thread writes may be held up, and holds the lock of the log meanwhile."""
    say_soon(lambda: logger.warning(message, name))
