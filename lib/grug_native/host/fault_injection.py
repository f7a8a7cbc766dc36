"""Faults on demand, for the tests: the environment names one, and the process fails at that very point.

`GRUG_FAULT` holds one or more of `kind@point:step` or `kind@point:step:process`, separated by commas; `step` may be
`*`. For example `kill@pre_commit:20` kills the process when it is about to make step 20's checkpoint visible.
"""

import errno
import os
import signal
import time
from typing import Literal, get_args

ENV_NAME = "GRUG_FAULT"

FaultPoint = Literal[
    "compile",
    "data",
    "fetch",
    "step",
    "log",
    "eval",
    "pre_save",
    "after_d2h",
    "mid_write",
    "pre_commit",
    "post_commit",
    "mid_gc",
]
"""Where a fault may strike: in the loop (`fetch` is on its data thread), in the six stages of a save, and while an old
checkpoint is deleted."""

FaultKind = Literal["kill", "term", "int", "hup", "stop", "raise", "enospc", "memory", "sleep", "nan"]
"""What happens: SIGKILL, SIGTERM, SIGINT, SIGHUP or SIGSTOP to this process, an exception, a full disk, no memory, a
stuck minute, or a non-finite value, which the caller has to put in itself."""

_SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "hup": signal.SIGHUP,
    "stop": signal.SIGSTOP,
}
_SLEEP_SECONDS = 60.0


class InjectedFaultError(RuntimeError):
    """The fault of kind `raise`."""


def fault_point(point: FaultPoint, step: int, *, process: int = 0) -> Literal["nan"] | None:
    """Fails here if the environment says so; otherwise costs one look into it.

    Args:
        point: Where the caller is.
        step: The training step it is at.
        process: The index of this process among those of the run.

    Returns:
        "nan" if the caller must put a non-finite value in, else None.

    Raises:
        InjectedFaultError: For kind `raise`.
        OSError: For kind `enospc`.
        MemoryError: For kind `memory`.
        ValueError: The environment names no known fault.
    """
    wanted = os.environ.get(ENV_NAME)
    if wanted is None:
        return None
    struck: Literal["nan"] | None = None
    for fault in wanted.split(","):
        kind, place, at_step, at_process = _parse(fault)
        if place == point and at_step in ("*", str(step)) and at_process in ("*", str(process)):
            struck = _strike(kind, f"{fault} struck at {point}, step {step}") or struck
    return struck


def _parse(fault: str) -> tuple[str, str, str, str]:
    kind, _, where = fault.partition("@")
    place, at_step, at_process = (*where.split(":"), "*", "*")[:3]
    if kind not in get_args(FaultKind) or place not in get_args(FaultPoint):
        raise ValueError(f"{ENV_NAME}={fault!r} must be kind@point:step[:process], of {FaultKind} and {FaultPoint}")
    return kind, place, at_step, at_process


def _strike(kind: str, message: str) -> Literal["nan"] | None:
    match kind:
        case "raise":
            raise InjectedFaultError(message)
        case "enospc":
            raise OSError(errno.ENOSPC, message)
        case "memory":
            raise MemoryError(message)
        case "sleep":
            time.sleep(_SLEEP_SECONDS)
        case "nan":
            return "nan"
        case _:
            os.kill(os.getpid(), _SIGNALS[kind])
    return None
