"""Our trainer against its peers, side by side: `python -m experiments.benchmarks.compare --shape CPU-S`.

Each contender is a process of its own that stays alive: it compiles once, takes its turn of a few steps, and waits
without using the processor while the others take theirs. All start from the same weights and see the same batches with
the same optimizer, and their losses must agree, or the comparison fails. What is measured:

- `rounds`: time of a step, in turns: from the end of the wait until the last step of the turn is done, divided by the
  steps. The contender's first two steps are left out. Memory and losses are those of the same processes.
- `start`: from the start of a process to the end of its first step, twice: with nothing compiled before (cold), and
  with what the first one left behind (warm). `compile` is the first step less a later one. Tokens are cached before.
- `host`: a step of a model that computes next to nothing, so that what is left is the host's work for a step. On a
  GPU, for contenders that do not wait for the device, the time from a step's call to its return stands in its place.

`ours_fit` and `levanter_train` are whole training loops on real data, `ours_step` is a bare compiled step, and
`torch_eager` and `torch_compile` are bare steps as well. torch is no dependency: name an interpreter that has it with
`--torch-python`. On a GPU, `--contenders ours_step,torch_compile` needs nothing of levanter.

MFU on a CPU is the share of what products of f32 matrices reached in the same run, and on a GPU the share of the
maker's dense bf16 figure; `full` counts attention over the whole square and `causal` half of it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from experiments.benchmarks.peers.shapes import SHAPES, Job
from experiments.benchmarks.peers.summary import Comparison, Session, Start
from experiments.benchmarks.peers.worker import (
    CONTENDERS,
    MATMUL,
    Worker,
    clear_compilation_cache,
    has_torch,
    run_module,
)

PHASES = ("start", "rounds", "host")
HOST_WARMUP, HOST_STEPS, HOST_TURNS = 20, 50, 5
PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy", "marin-levanter", "marin-haliax")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and fails if losses disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="CPU-S", choices=SHAPES)
    parser.add_argument("--contenders", help=f"of {','.join(CONTENDERS)} (default: all that can run)")
    parser.add_argument("--phases", default=",".join(PHASES), help="what to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--data", choices=("corpus", "random"), help="(default: random for the shapes of a GPU)")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch (default: this one)")
    parser.add_argument("--cpu-devices", type=int, default=1, help="of ours; the others have one")
    parser.add_argument(
        "--model", action="append", default=[], metavar="FIELD=VALUE", help="of our model's config: remat=full"
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="start a contender anew for each of its turns, where not all fit in memory together",
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--append", action="store_true", help="add to what is in the file, and print all of it")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/compare"), help="of weights, batches and logs")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"), help="of the embedded corpus")
    arguments = parser.parse_args(argv)
    data = arguments.data or ("random" if arguments.shape.startswith("G-") else "corpus")
    names = _choose(parser, arguments.contenders, arguments.torch_python, data)
    phases = arguments.phases.split(",")
    if unknown := [phase for phase in phases if phase not in PHASES]:
        parser.error(f"unknown phases {unknown}: choose of {', '.join(PHASES)}")

    comparison = Comparison(arguments.shape, environment())
    if arguments.append and arguments.json is not None and arguments.json.is_file():
        comparison = Comparison.from_json(json.loads(arguments.json.read_text()))
        if comparison.shape != arguments.shape:
            parser.error(f"{arguments.json} is of shape {comparison.shape}")
    folder = arguments.work_dir.resolve() / arguments.shape
    bench = _Bench(comparison, names, arguments.torch_python, one_at_a_time=arguments.one_at_a_time)
    job = Job(
        folder=f"{folder}-start",
        shape=arguments.shape,
        num_batches=max(2 + arguments.rounds * arguments.steps, 32),
        data=data,
        corpora=str(arguments.cache_dir.resolve()),
        cpu_devices=arguments.cpu_devices,
        model=dict(map(_model_field, arguments.model)),
        levanter_weights=False,
    )
    for phase in phases:
        if phase == "start":
            bench.measure_starts(job)
        elif phase == "rounds":
            shared = replace(job, folder=str(folder), levanter_weights="levanter_train" in names)
            bench.measure_rounds(shared, arguments.rounds, arguments.steps)
        else:
            batches = 2 + HOST_WARMUP + HOST_STEPS * HOST_TURNS
            bench.measure_host(replace(job, shape="host", folder=f"{folder}-host", num_batches=batches))
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(comparison.to_json(), indent=1) + "\n")
    print(markdown(comparison))
    if wrong := comparison.disagreements():
        raise SystemExit("\n".join(wrong))


def _choose(parser: argparse.ArgumentParser, asked: str | None, torch_python: str, data: str) -> list[str]:
    names = list(CONTENDERS) if asked is None else asked.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"unknown contenders {unknown}: choose of {', '.join(CONTENDERS)}")
    if data == "random" and (loops := {"ours_fit", "levanter_train"}.intersection(names)):
        if asked is not None:
            parser.error(f"--data random is for bare steps, and not for {sorted(loops)}")
        names = [name for name in names if name not in loops]
    if any(CONTENDERS[name].torch for name in names) and not has_torch(torch_python):
        if asked is not None:
            parser.error(f"{torch_python} has no torch: name an interpreter that has it with --torch-python")
        names = [name for name in names if not CONTENDERS[name].torch]
    return names


class _Bench:
    def __init__(self, comparison: Comparison, names: Sequence[str], torch_python: str, *, one_at_a_time: bool):
        self._comparison, self._names, self._torch_python = comparison, names, torch_python
        self._one_at_a_time = one_at_a_time

    def _start(self, name: str, job: Job) -> Worker:
        _say(f"{job.shape}: starting {name}")
        return Worker(
            name,
            CONTENDERS.get(name, MATMUL),
            job,
            torch_python=self._torch_python,
            memory_fraction=0.9 / (1 if self._one_at_a_time else len(self._names)),
        )

    def _prepare(self, job: Job) -> None:
        folder = Path(job.folder)
        path, done = folder / "job.json", folder / "flops.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not (path.is_file() and done.is_file() and Job.read(str(path)) == job):
            _say(f"{job.shape}: making weights and batches")
            done.unlink(missing_ok=True)
            job.write()
            # On the CPU, so that it takes nothing of a GPU.
            run_module("inputs", [str(path)], environment={"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"})
        if job.shape == self._comparison.shape:
            self._comparison.flops = json.loads((Path(job.folder) / "flops.json").read_text())

    def measure_starts(self, job: Job) -> None:
        """Each contender alone, cold and warm."""
        self._prepare(job)
        for name in self._names:
            record = self._comparison.record(name)
            clear_compilation_cache(job, name)
            for starts in (record.cold, record.warm):
                with closing(self._start(name, job)) as worker:
                    first = worker.read()
                    later = worker.run(2)
                after = first.finished_at - worker.started_at
                starts.append(Start(after, first.calls[0] - later.step))
                _say(f"{name}: first step after {after:.1f} s")

    def measure_rounds(self, job: Job, rounds: int, steps: int) -> None:
        """All contenders in turns."""
        self._prepare(job)
        if self._one_at_a_time:
            self._measure_rounds_one_at_a_time(job, rounds, steps)
            return
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            session: Session = {}
            for name in self._names:
                workers[name] = self._start(name, job)
                stack.callback(workers[name].close)
                session[name] = [workers[name].read()]
            matmul = None
            if session[self._names[0]][0].about["platform"] == "cpu":
                matmul = self._start("matmul", job)
                stack.callback(matmul.close)
                matmul.read()
            for name, worker in workers.items():
                session[name].append(worker.run(1))
            for number in range(rounds):
                # Another one begins each round: no one always comes after the same.
                order = [*self._names[number % len(workers) :], *self._names[: number % len(workers)]]
                for name in order:
                    worker = workers[name]
                    before = {other: process.cpu_seconds() for other, process in workers.items()}
                    turn = worker.run(steps)
                    session[name].append(turn)
                    _say(f"round {number}: {name} {turn.seconds / steps:.3f} s a step")
                    for other, process in workers.items():
                        if other != name:
                            idle = (process.cpu_seconds() - before[other]) / turn.seconds
                            self._comparison.record(other).idle.append(idle)
                if matmul is not None:
                    self._comparison.matmul += matmul.run(1).values
        self._comparison.sessions.append(session)
        for name in self._names:
            if (idle := statistics.mean(self._comparison.record(name).idle or [0])) > 0.02:
                _say(f"warning: {name} used {idle:.2f} processors while it waited")

    def _measure_rounds_one_at_a_time(self, job: Job, rounds: int, steps: int) -> None:
        for number in range(rounds):
            session: Session = {}
            for name in self._names:
                with closing(self._start(name, job)) as worker:
                    session[name] = [worker.read(), worker.run(1), worker.run(steps)]
                _say(f"round {number}: {name} {session[name][-1].seconds / steps:.3f} s a step")
            self._comparison.sessions.append(session)
            if session[self._names[0]][0].about["platform"] == "cpu":
                with closing(self._start("matmul", job)) as worker:
                    self._comparison.matmul += worker.read().values

    def measure_host(self, job: Job) -> None:
        """Each contender alone, on the model that computes next to nothing."""
        self._prepare(job)
        for name in self._names:
            with closing(self._start(name, job)) as worker:
                worker.read()
                worker.run(HOST_WARMUP)
                turns = [worker.run(HOST_STEPS) for _ in range(HOST_TURNS)]
            self._comparison.record(name).host += [turn.seconds / len(turn.steps) for turn in turns]


def _model_field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def environment() -> dict[str, str]:
    """What the numbers depend on besides the code."""
    installed = {item.metadata["Name"]: item.version for item in distributions()}
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{len(os.sched_getaffinity(0))} x {cpu[0].split(': ')[1] if cpu else platform.machine()}",
        "python": platform.python_version(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **{name: installed[name] for name in PACKAGES if name in installed},
    }


def markdown(comparison: Comparison) -> str:
    """The table, and what it was measured on."""
    rows = comparison.rows()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    parts = [
        f"{comparison.shape}: {SHAPES[comparison.shape]}",
        *(f"{k} {v}" for k, v in comparison.environment.items()),
    ]
    if comparison.matmul:
        parts.append(f"f32 matmul peak {max(comparison.matmul) / 1e9:.0f} GFLOP/s")
    about = {name: turns[0].about for session in comparison.sessions for name, turns in session.items()}
    parts += [f"{name}: {', '.join(f'{k} {v}' for k, v in facts.items())}" for name, facts in about.items()]
    differences = comparison.loss_differences()
    if differences:
        parts.append(
            f"losses differ from those of {comparison.baseline} by at most "
            + ", ".join(f"{value:.1e} ({name})" for name, value in differences.items())
        )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + "\n\n" + "\n".join(parts)


def _say(words: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
