"""The parent's end of a comparison: one process for each contender, of which one works at a time."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from experiments.benchmarks.peers.gate import Turn
from experiments.benchmarks.peers.shapes import Job

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Contender:
    """Which module trains, and what is known about it beforehand."""

    module: str
    """Name of the module beside this one."""
    arguments: tuple[str, ...] = ()
    torch: bool = False
    """Whether torch's interpreter runs it."""


CONTENDERS = {
    "ours_fit": Contender("program", ("ours_fit",)),
    "ours_step": Contender("program", ("ours_step",)),
    "levanter_train": Contender("levanter_train"),
    "torch_eager": Contender("torch_llama", ("eager",), torch=True),
    "torch_compile": Contender("torch_llama", ("compile",), torch=True),
}
PACKED = {
    "ours_step": Contender("program", ("ours_step", "packed")),
    "torch_compile": Contender("torch_llama", ("compile", "packed"), torch=True),
}
"""The same on packed rows, in which attention stays within a document."""
MATMUL = Contender("matmul")


def run_module(module: str, arguments: list[str], *, environment: Mapping[str, str]) -> None:
    """Runs a module of this package to its end.

    Raises:
        subprocess.CalledProcessError: if it failed.
    """
    command = [sys.executable, "-m", f"experiments.benchmarks.peers.{module}", *arguments]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)


def has_torch(python: str) -> bool:
    """Whether an interpreter has torch; it is in the system's file cache afterwards."""
    return subprocess.run([python, "-c", "import numpy, torch"], stderr=subprocess.DEVNULL).returncode == 0


@final
class Worker:
    """A contender's process. Its caches of compiled code are in the job's folder, and outlive it."""

    def __init__(self, name: str, contender: Contender, job: Job, *, torch_python: str, memory_fraction: float):
        """Starts it; `read` gives its first step.

        Args:
            name: of its log and its caches.
            contender: what to run.
            job: has been written and made.
            torch_python: interpreter with torch.
            memory_fraction: of a GPU, which JAX may take.
        """
        cache = compilation_cache(job, name)
        environment = {
            "HF_HUB_OFFLINE": "1",
            "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{memory_fraction:.2f}",
        }
        self.name = name
        self._log_path = Path(job.folder) / f"{name}.log"
        self._log = self._log_path.open("w")
        self.started_at = time.time()
        self._process = subprocess.Popen(
            [
                torch_python if contender.torch else sys.executable,
                "-m",
                f"experiments.benchmarks.peers.{contender.module}",
                f"{job.folder}/job.json",
                *contender.arguments,
            ],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def read(self) -> Turn:
        """Waits for the end of a turn.

        Raises:
            RuntimeError: if the process is over; with the end of its log.
        """
        line = _of(self._process.stdout).readline()
        if not line:
            tail = "\n".join(self._log_path.read_text().splitlines()[-30:])
            raise RuntimeError(f"{self.name} is over with code {self._process.wait()}:\n{tail}")
        return Turn(**json.loads(line))

    def run(self, steps: int) -> Turn:
        """Has it take steps, and waits for their end."""
        print(steps, file=_of(self._process.stdin), flush=True)
        return self.read()

    def cpu_seconds(self) -> float:
        """Processor time that it took so far, in all its threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._log.close()


def compilation_cache(job: Job, name: str) -> Path:
    """Where a contender's compiled code is kept."""
    return Path(job.folder) / "compiled" / name


def clear_compilation_cache(job: Job, name: str) -> None:
    """Makes the next start a cold one."""
    shutil.rmtree(compilation_cache(job, name), ignore_errors=True)


def _of(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
