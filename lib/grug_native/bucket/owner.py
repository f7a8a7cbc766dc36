"""Who owns a run: a process, and whether it is certain that it has ended."""

import os
import secrets
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final, override


@final
@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that may change the run."""

    host: str
    """Its machine's name."""
    pid: int
    """Its process id there."""
    process: str
    """The very process among all of its machine, past ones too; empty if that cannot be told."""
    nonce: str
    """Drawn by it."""
    since: str
    """When it took the run, UTC, ISO 8601; for people."""
    lease: float
    """It shows a sign of life several times in so many seconds."""

    @override
    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}, since {self.since}"


def this_process(lease: float) -> Owner:
    """Returns this process as an owner."""
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_of(os.getpid()),
        nonce=secrets.token_hex(4),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        lease=float(lease),
    )


def process_of(pid: int) -> str:
    """The boot of this machine, the space of process ids, and when the process began; empty if there is no such."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else f"{boot}/{os.readlink('/proc/self/ns/pid')}/{rest[18]}"
    except OSError:
        return ""


def is_gone(owner: Owner) -> bool:
    """Whether it is certain that a process has ended, because it ran on this machine."""
    here = process_of(os.getpid()).rpartition("/")[0]
    if not here or owner.host != socket.gethostname() or owner.process.rpartition("/")[0] != here:
        return False
    return process_of(owner.pid) != owner.process
