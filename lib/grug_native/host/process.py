"""What a program asks of its process before anything heavy is imported, in variables that the user may also set."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

TUNABLES_VARIABLE = "GLIBC_TUNABLES"
"""Environment variable from which glibc takes its settings, once, as a process starts."""

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
"""Environment variable that names the folder in which JAX keeps what it has compiled."""

SHORTEST_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
"""Environment variable that names the seconds that a compilation takes at least, if JAX is to keep what comes of it."""

FLAGS_VARIABLE = "XLA_FLAGS"
"""Environment variable from which XLA takes its settings, once, as JAX starts."""

GPU_FLAGS = {
    "--xla_gpu_enable_triton_gemm=false": "products by cuBLAS alone: so the fastest step of a 1.3B model was "
    "measured on an H200",
}
"""XLA's settings for GPUs, each with what was measured. One that the user sets, to whatever value, is left alone."""

_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_SECONDS_TO_TIDY = 1.0
_SECONDS_TO_SAY = 0.3

_tidying: list[Callable[[], object]] = []


def end_at_ctrl_c() -> None:
    """Has Ctrl-C end this process at once, with 130, wherever its main thread is; call it before heavy imports.

    Python would raise `KeyboardInterrupt` between two bytecodes of the main thread. What is deep in foreign code, to
    compile or to load a library, hears nothing for seconds; and raised in the middle of an import, it is swallowed, or
    aborts the process. So a thread watches for the signal through a file descriptor that the C-level handler writes to,
    tidies up (see `tidied_at_ctrl_c`), and ends the process. While a `StopSignal` is entered, that hears the signals in
    its place. Where SIGINT is ignored, or somebody else's, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    watched, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _stand_still)
    threading.Thread(target=_watch, args=(watched, told), name="grug-ctrl-c", daemon=True).start()


@contextmanager
def tidied_at_ctrl_c(tidy: Callable[[], object]) -> Generator[None]:
    """Has `tidy` called, in another thread, where Ctrl-C ends the process from within (see `end_at_ctrl_c`)."""
    _tidying.append(tidy)
    try:
        yield
    finally:
        _tidying.remove(tidy)


def say_soon(say: Callable[[], object]) -> None:
    """Calls what writes a message, and waits for it only a moment: whoever should read it may never do so."""
    _call_within(_SECONDS_TO_SAY, say)


def _call_within(seconds: float, call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def _watch(watched: socket.socket, told: socket.socket) -> None:
    with watched, told:
        while watched.recv(1)[0] != signal.SIGINT:
            pass
        for tidy in reversed(_tidying):
            _call_within(_SECONDS_TO_TIDY, tidy)
        say_soon(_flush)
        os._exit(128 + signal.SIGINT)


def _stand_still(number: int, frame: FrameType | None) -> None:
    """Keeps the main thread from what is being tidied up."""
    time.sleep(_SECONDS_TO_TIDY + _SECONDS_TO_SAY)
    os._exit(128 + number)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def prepare_process() -> None:
    """Settles the environment of a program that trains, and restarts it if it was not started so; call it first.

    XLA:CPU takes the temporaries of a step, a gigabyte and more, anew from the system at each step, and on pages of
    4 KiB the faults cost a tenth of it; with huge pages they cost next to nothing. glibc reads that setting only as a
    process starts, so this one executes itself again, under the same process id. An empty `GLIBC_TUNABLES` forbids it.
    Compiled functions are kept, see `keep_compiled`; for GPUs see `set_gpu_flags`.
    """
    for descriptor in range(3):  # A file that took the place of a closed stderr would have messages in it.
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    keep_compiled()
    set_gpu_flags()
    if sys.platform == "linux" and TUNABLES_VARIABLE not in os.environ:
        os.environ[TUNABLES_VARIABLE] = _HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled() -> None:
    """Has JAX keep what it compiles in the user's cache folder, or where `JAX_COMPILATION_CACHE_DIR` says.

    Small functions too: a small model's start is made of many. To be called before JAX is imported.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grug_native" / "xla"
    os.environ.setdefault(CACHE_VARIABLE, str(cache))
    os.environ.setdefault(SHORTEST_VARIABLE, "0")


def set_gpu_flags() -> None:
    """Adds `GPU_FLAGS` to the environment where JAX's plugin for CUDA is installed; to be called before JAX starts."""
    if find_spec("jax_cuda13_plugin") is not None:
        os.environ[FLAGS_VARIABLE] = with_gpu_flags(os.environ.get(FLAGS_VARIABLE, ""))


def with_gpu_flags(flags: str) -> str:
    """XLA's settings `flags`, and those of `GPU_FLAGS` that do not stand there."""
    names = {flag.partition("=")[0] for flag in flags.split()}
    return " ".join([*flags.split(), *(flag for flag in GPU_FLAGS if flag.partition("=")[0] not in names)])


@cache
def code_commit() -> str | None:
    """The commit of the repository that this code lies in, `-dirty` if files in it are changed; None if it is in none.

    It is that of the first call: later changes are not those of the code that runs.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # There is no git.
        return None
    return done.stdout.strip() if done.returncode == 0 else None
