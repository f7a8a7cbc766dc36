"""The table of a GPU in one command: `python -m experiments.benchmarks.gpu`.

Our compiled step against `torch.compile` at two sizes, on rows of one document and on packed rows of three to nine, in
bf16. It needs a GPU, and an interpreter with torch (`--torch-python`; by default the one that runs this). It needs no
network, and of our dependencies jax, equinox, optax and jaxtyping. What fits in memory together is started
side by side, and takes turns; the rest is started one after the other, and its row says so. Printed for each:

- the time of a step, tokens/s, and MFU by both counts of attention (the whole square, and half of it);
- peak memory on the device, and what the host does for a step;
- compile time (the first step less a later one), and the time from the start of the process to the end of the first
  step, with nothing compiled before, while those beside it start too;
- the losses, which have to agree at every step.

`--profile` adds the twenty dearest kernels of our step. All numbers go to `--json`. What there was no time for within
`--minutes` is named, and not measured. `--shape toy --cpu` runs the same where there is no GPU, in f32: it shows that
the command works and that losses agree, and nothing of a GPU's speed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from experiments.benchmarks.compare import environment, markdown
from experiments.benchmarks.peers.shapes import SHAPES, Job
from experiments.benchmarks.peers.summary import Comparison, Session, Start
from experiments.benchmarks.peers.worker import (
    CONTENDERS,
    PACKED,
    Worker,
    clear_compilation_cache,
    has_torch,
    run_module,
)

NEEDED = ("jax", "equinox", "optax", "jaxtyping", "numpy")
NAMES = ("ours_step", "torch_compile")
GIB = {"G-124M": 14.0, "G-1.3B": 62.0}
"""Of the device, with some to spare, for a contender of a shape; measured were 9 and 56."""
PROFILED_STEPS = 5

type Kind = Literal["plain", "packed"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Two contenders at one shape, on one kind of rows."""

    shape: str
    """One of `SHAPES`."""
    kind: Kind
    """Whether rows are packed."""

    @property
    def name(self) -> str:
        """Of the group's row in the table."""
        return f"{self.shape}-{self.kind}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; fails if losses disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="(default: G-124M and G-1.3B)")
    parser.add_argument("--profile", action="store_true", help="print the dearest kernels of ours too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a turn (default: 20 for G-124M, 6 for G-1.3B, else 3)")
    parser.add_argument("--minutes", type=float, help="after which no group is begun (default: 4, or 8 with --profile)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch (default: this one)")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu/gpu.json"), help="(default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/gpu"), help="of weights, batches, logs, traces")
    arguments = parser.parse_args(argv)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        parser.error(f"{sys.executable} lacks {', '.join(missing)}: pip install {' '.join(missing)}")
    if not has_torch(arguments.torch_python):
        parser.error(f"{arguments.torch_python} has no torch: name an interpreter that has it with --torch-python")
    memory = None if arguments.cpu else device_memory(arguments.torch_python)
    if not arguments.cpu and memory is None:
        parser.error(f"the torch of {arguments.torch_python} finds no GPU; --shape toy --cpu shows that the rest works")
    if arguments.cpu:
        print("on a CPU, in f32: this compares losses, and says nothing of the speed on a GPU")
    begun = time.monotonic()
    minutes = arguments.minutes or (8 if arguments.profile else 4)
    groups = [
        Group(shape=shape, kind=kind)
        for shape in arguments.shape or ["G-124M", "G-1.3B"]
        for kind in ("plain", "packed")
    ]
    bench = _Bench(arguments, memory)
    found: dict[str, Comparison] = {}
    planned = waves(groups, memory)
    with bench.stack:
        for wave, later in zip(planned, [*planned[1:], []], strict=True):
            if time.monotonic() - begun > 60 * minutes:
                print(f"no time for {', '.join(group.name for group in wave)}: not measured; see --minutes and --shape")
                continue
            measured = bench.measure(wave, later)
            found |= measured
            for name, comparison in measured.items():
                print(f"\n{name}, {bench.how[name]}\n\n{markdown(comparison)}")
                if name in bench.tables:
                    print(f"\n{name}, ours_step: {bench.tables[name]}", flush=True)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            rows = {
                name: c.to_json() | {"how": bench.how[name], "kernels": bench.tables.get(name)}
                for name, c in found.items()
            }
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\nall numbers: {arguments.json}")
    if wrong := [f"{name}: {words}" for name, c in found.items() for words in c.disagreements()]:
        raise SystemExit("\n".join(wrong))


def device_memory(torch_python: str) -> float | None:
    """GiB of the first GPU, by another process, so that this one holds none of it; None if there is none."""
    words = "import torch; print(torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory)"
    said = subprocess.run([torch_python, "-c", words], check=True, capture_output=True, text=True).stdout.strip()
    return None if said == "False" else int(said) / 2**30


def waves(groups: Sequence[Group], memory: float | None) -> list[list[Group]]:
    """Groups that follow each other and fit on the device together, or all of them on a CPU."""
    found: list[list[Group]] = []
    for group in groups:
        if found and fits([*found[-1], group], memory):
            found[-1].append(group)
        else:
            found.append([group])
    return found


def fits(groups: Sequence[Group], memory: float | None, *, beside: float = 0.0) -> bool:
    """Whether all contenders of the groups have room on the device together, `beside` so many GiB."""
    wanted = beside + sum(len(NAMES) * GIB.get(group.shape, 4.0) for group in groups)
    return memory is None or wanted < 0.95 * memory


class _Bench:
    def __init__(self, arguments: argparse.Namespace, memory: float | None):
        self._arguments, self._memory = arguments, memory
        self.how: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        self._prepared: dict[str, Job] = {}
        self._early: dict[tuple[Group, str], tuple[Worker, Session]] = {}
        self.stack = ExitStack()
        """Closes what was started early."""

    def measure(self, wave: Sequence[Group], later: Sequence[Group]) -> dict[str, Comparison]:
        """Starts a wave's contenders side by side and lets them take turns; by group.

        If there is room, the one of the later wave that compiles longest is started too, and waits for its turn.
        """
        for shape in dict.fromkeys(group.shape for group in wave):
            self._prepare(shape)
        found = {group.name: Comparison(group.shape, environment(), self._flops(group.shape)) for group in wave}
        together = fits(wave, self._memory)
        parties = [[(group, name) for group in wave for name in NAMES]]
        if not together:
            parties = [[one] for one in parties[0]]
        for group in wave:
            self.how[group.name] = "in turns" if together else "one after the other: two do not fit in memory"
            found[group.name].sessions.append({})
        early = later[:1] if together and later and self._has_room(wave, later[0]) else []
        for party in parties:
            with ExitStack() as stack:
                with ThreadPoolExecutor(len(party) + 1) as pool:
                    ahead = [pool.submit(self._start_early, group, len(party) + 1) for group in early]
                    started = [pool.submit(self._start, stack, *one, len(party)) for one in party]
                workers = {one: done.result() for one, done in zip(party, started, strict=True)}
                for done in ahead:
                    done.result()
                self._take_turns(workers, found)
        return found

    def _has_room(self, wave: Sequence[Group], group: Group) -> bool:
        return fits(wave, self._memory, beside=GIB.get(group.shape, 4.0))

    def _start_early(self, group: Group, beside: int) -> None:
        self._prepare(group.shape)
        self._early[group, NAMES[-1]] = self._start(self.stack, group, NAMES[-1], beside)

    def _start(self, stack: ExitStack, group: Group, name: str, beside: int) -> tuple[Worker, Session]:
        if early := self._early.pop((group, name), None):
            stack.callback(early[0].close)
            return early
        job = self._prepared[group.shape]
        contender = (CONTENDERS if group.kind == "plain" else PACKED)[name]
        if self._arguments.profile and name == "ours_step":
            first = 2 + self._arguments.rounds * self._steps(group)
            asked = f"profile={self._trace(group)}:{first}:{PROFILED_STEPS}"
            contender = replace(contender, arguments=(*contender.arguments, asked))
        own = f"{name}-{group.kind}"
        clear_compilation_cache(job, own)
        _say(f"{group.name}: starting {name}")
        fraction = 0.9 if beside == 1 else GIB.get(group.shape, 4.0) / (self._memory or 80.0)
        worker = Worker(own, contender, job, torch_python=self._arguments.torch_python, memory_fraction=fraction)
        stack.callback(worker.close)
        first_turn = worker.read()
        _say(f"{group.name}: {name} has made its first step after {first_turn.finished_at - worker.started_at:.1f} s")
        return worker, {name: [first_turn]}

    def _take_turns(
        self, workers: dict[tuple[Group, str], tuple[Worker, Session]], found: dict[str, Comparison]
    ) -> None:
        for (_, name), (worker, session) in workers.items():
            session[name].append(worker.run(1))
        contenders = list(workers)
        for number in range(self._arguments.rounds):
            first = number % len(contenders)
            for group, name in [*contenders[first:], *contenders[:first]]:
                worker, session = workers[group, name]
                session[name].append(worker.run(self._steps(group)))
                _say(f"{group.name}: round {number}: {name} {1e3 * session[name][-1].step:.2f} ms a step")
        for (group, name), (worker, session) in workers.items():
            comparison, turns = found[group.name], session[name]
            start = turns[0].finished_at - worker.started_at
            comparison.record(name).cold.append(Start(start, turns[0].calls[0] - turns[-1].step))
            comparison.sessions[0][name] = turns
            if self._arguments.profile and name == "ours_step":
                worker.run(PROFILED_STEPS)
                self.tables[group.name] = (self._trace(group) / "profile.txt").read_text()

    def _prepare(self, shape: str) -> None:
        folder = self._arguments.work_dir.resolve() / shape
        steps = self._steps(Group(shape=shape, kind="plain"))
        job = Job(
            folder=str(folder),
            shape=shape,
            num_batches=2 + self._arguments.rounds * steps + PROFILED_STEPS,
            data="random",
            corpora="",
            cpu_devices=1,
            model={},
            levanter_weights=False,
        )
        self._prepared[shape] = job
        path, done = folder / "job.json", folder / "flops.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not (path.is_file() and done.is_file() and Job.read(str(path)) == job):
            _say(f"{shape}: making weights and batches")
            done.unlink(missing_ok=True)
            job.write()
            run_module("inputs", [str(path)], environment={"JAX_PLATFORMS": "cpu"})

    def _flops(self, shape: str) -> dict[str, float]:
        return json.loads((Path(self._prepared[shape].folder) / "flops.json").read_text())

    def _steps(self, group: Group) -> int:
        return self._arguments.steps or {"G-124M": 20, "G-1.3B": 6}.get(group.shape, 3)

    def _trace(self, group: Group) -> Path:
        return Path(self._prepared[group.shape].folder) / f"profile-{group.kind}"


def _say(words: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
