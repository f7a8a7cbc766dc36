"""From what the workers said to one row for each contender."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments.benchmarks.peers.gate import Turn
from experiments.benchmarks.peers.shapes import SHAPES

PEAK_BF16_FLOPS = {"NVIDIA H100": 989.5e12, "NVIDIA H200": 989.5e12}
"""By the beginning of a device's name: the maker's dense bf16 operations per second (SXM)."""

LOSS_TOLERANCE = {"ours_step": 1e-6}
"""Relative. `fit()` and the bare step are one computation."""
LOSS_TOLERANCE_F32 = 1e-3
"""The others add in another order, from the same weights on the same batches."""
LOSS_TOLERANCE_BF16 = 5e-3
"""In bf16 a sum in another order differs by a part in 256, and what is rounded differs between the frameworks."""


@dataclass
class Start:
    """One process from its start to its first step."""

    first_step_after: float
    """Seconds from the start of the process to the end of its first step."""
    compile: float
    """Seconds of the first step beyond a later one."""


type Session = dict[str, list[Turn]]
"""Processes that took turns with each other: their turns, by contender. The first two of each are for warming up."""

WARMUP_TURNS = 2


@dataclass
class Record:
    """What was measured of a contender alone."""

    cold: list[Start] = field(default_factory=list[Start])
    """Starts with nothing compiled before."""
    warm: list[Start] = field(default_factory=list[Start])
    """Starts after a cold one."""
    host: list[float] = field(default_factory=list[float])
    """Seconds of a step of the model that computes next to nothing."""
    idle: list[float] = field(default_factory=list[float])
    """Processors that it used while another one worked, by round."""


@dataclass
class Comparison:
    """What goes to the JSON file and comes back from it."""

    shape: str
    """Name of the sizes."""
    environment: dict[str, Any]
    """Machine, versions and variables."""
    flops: dict[str, float] = field(default_factory=dict[str, float])
    """Operations of a token, `full` and `causal`, and the number of `parameters`."""
    records: dict[str, Record] = field(default_factory=dict[str, Record])
    """What is known of each contender."""
    sessions: list[Session] = field(default_factory=list[Session])
    """What the contenders did in turns."""
    matmul: list[float] = field(default_factory=list[float])
    """Operations per second that products of f32 matrices reached, by round."""

    def record(self, name: str) -> Record:
        """The record of a contender, a new one if need be."""
        return self.records.setdefault(name, Record())

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Comparison":
        """Reads what `asdict` made."""
        records = {
            name: Record(
                cold=[Start(**start) for start in record["cold"]],
                warm=[Start(**start) for start in record["warm"]],
                host=record["host"],
                idle=record["idle"],
            )
            for name, record in raw["records"].items()
        }
        sessions = [
            {name: [Turn(**turn) for turn in turns] for name, turns in session.items()} for session in raw["sessions"]
        ]
        return Comparison(raw["shape"], raw["environment"], raw["flops"], records, sessions, raw["matmul"])

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `from_json`, with the rows of the table for readers."""
        return asdict(self) | {"rows": self.rows(), "loss_differences": self.loss_differences()}

    @property
    def baseline(self) -> str:
        """The contender to which the others are compared: `fit()` where it took part."""
        names = ("ours_fit", "ours_step", *(name for session in self.sessions for name in session))
        return next(name for name in names if self._turns(name))

    def _turns(self, name: str) -> list[Turn]:
        return [turn for session in self.sessions for turn in _timed(session, name)]

    def loss_differences(self) -> dict[str, float]:
        """Largest relative difference of a loss from the baseline's at the same step of the same session."""
        differences: dict[str, float] = {}
        for session in self.sessions:
            if ours := session.get(self.baseline):
                for name in session.keys() - {self.baseline}:
                    found = _difference(_losses(session[name]), _losses(ours))
                    differences[name] = max(found, differences.get(name, 0.0))
        return dict(sorted(differences.items()))

    def disagreements(self) -> list[str]:
        """The contenders whose losses are not the baseline's, in words."""
        words: list[str] = []
        for name, difference in self.loss_differences().items():
            platform = self._turns(name)[0].about["platform"]
            limit = LOSS_TOLERANCE.get(name, LOSS_TOLERANCE_F32 if platform == "cpu" else LOSS_TOLERANCE_BF16)
            if difference > limit:
                words.append(f"{name}: losses differ from those of {self.baseline} by {difference:.1e} > {limit:.0e}")
        return words

    def rows(self) -> list[dict[str, str]]:
        """The table: for each contender a cell in each column."""
        names = dict.fromkeys((*(name for session in self.sessions for name in session), *self.records))
        return [self._row(name) for name in names]

    def _row(self, name: str) -> dict[str, str]:
        record, tokens, turns = self.records.get(name, Record()), SHAPES[self.shape].tokens, self._turns(name)
        row = {"contender": name}
        if turns:
            rates = [tokens / turn.step for turn in turns]
            # Neighbours in time are compared, so that a slow drift of the machine cancels out.
            ratios = [
                its.step / own.step
                for session in self.sessions
                for its, own in zip(_timed(session, name), _timed(session, self.baseline), strict=False)
            ]
            row["step [s]"] = spread([turn.step for turn in turns], ".3f")
            row["tokens/s"] = spread(rates, ",.0f")
            row[f"{self.baseline} is faster by"] = spread(ratios, ".3f")
            about, last = turns[-1].about, turns[-1]
            peak = self._peak(about)
            if peak is not None:
                for count in ("full", "causal"):
                    row[f"MFU {count}"] = f"{statistics.median(rates) * self.flops[count] / peak:.1%}"
            row["peak RSS [GiB]"] = f"{last.peak_rss / 2**30:.2f}"
            if last.peak_device is not None:
                row["peak device [GiB]"] = f"{last.peak_device / 2**30:.2f}"
            losses = max((_losses(session.get(name, ())) for session in self.sessions), key=len)
            row["loss after"] = f"{losses[-1]:.5f} ({len(losses) - 1} steps)"
            if about["platform"] != "cpu":
                row["host [ms]"] = spread([1e3 * call for turn in turns for call in turn.calls], ".2f")
        if record.host:
            row["host [ms]"] = spread([1e3 * value for value in record.host], ".2f")
        for label, starts in (("cold", record.cold), ("warm", record.warm)):
            if starts:
                row[f"compile {label} [s]"] = f"{statistics.median(s.compile for s in starts):.1f}"
                row[f"first step {label} [s]"] = f"{statistics.median(s.first_step_after for s in starts):.1f}"
        return row

    def _peak(self, about: Mapping[str, str]) -> float | None:
        if about["platform"] == "cpu":
            return max(self.matmul) if self.matmul else None
        known = (flops for name, flops in PEAK_BF16_FLOPS.items() if about["device"].startswith(name))
        return next(known, None)


def spread(values: Sequence[float], form: str) -> str:
    """The median, and between which values the others lie."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _timed(session: Session, name: str) -> Sequence[Turn]:
    return session.get(name, ())[WARMUP_TURNS:]


def _losses(session: Sequence[Turn]) -> list[float]:
    return [value for turn in session for value in turn.values]


def _difference(losses: Sequence[float], others: Sequence[float]) -> float:
    relative = [abs(a - b) / abs(b) for a, b in zip(losses, others, strict=False)]
    return math.inf if any(map(math.isnan, relative)) else max(relative)
