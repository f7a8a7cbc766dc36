"""What the benchmarks share: taking turns, medians with their spread, what it was measured on, and the table."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grug_native import (
    AdamWConfig,
    GrugEvalConfig,
    GrugModelConfig,
    GrugNativeRunConfig,
    GrugTrainerConfig,
)
from grug_native.data.corpus import embedded_corpus
from grug_native.model import MODEL_PRESETS

SHAPES: dict[str, tuple[GrugModelConfig, int]] = {
    "tiny": (MODEL_PRESETS["tiny"], 16),
    "cpu-s": (
        GrugModelConfig(
            vocab_size=8192,
            hidden_dim=512,
            intermediate_dim=1408,
            num_layers=6,
            num_heads=8,
            num_kv_heads=8,
            max_seq_len=512,
        ),
        8,
    ),
}
"""Models that are measured, each with the sequences of a batch."""

_PACKAGES = ("jax", "jaxlib", "equinox", "optax", "marin-levanter", "numpy")


def make_run(
    shape: str,
    *,
    cache_dir: Path,
    folder: Path,
    eval_batches: int = 1,
    ema_beta: float | None = None,
    seed: int = 0,
) -> GrugNativeRunConfig:
    """A run on the embedded corpus that saves once, at its end.

    Args:
        shape: one of `SHAPES`.
        cache_dir: folder of the corpora.
        folder: where the run writes.
        eval_batches: of each validation set at most, in an evaluation.
        ema_beta: decay of a moving average of the parameters; None for none.
        seed: of weights and data.
    """
    model, batch_size = SHAPES[shape]
    return GrugNativeRunConfig(
        model=model,
        data=embedded_corpus(cache_dir, vocab_size=model.vocab_size),
        optimizer=AdamWConfig(),
        trainer=GrugTrainerConfig(
            num_train_steps=10_000,
            train_batch_size=batch_size,
            ema_beta=ema_beta,
            seed=seed,
            minutes_per_temporary_checkpoint=None,
        ),
        eval=GrugEvalConfig(max_eval_batches=eval_batches),
        output_path=str(folder),
    )


@dataclass(frozen=True)
class Spread:
    """A median, and how far it is to be trusted."""

    median: float
    """The middle one of the values."""
    low: float
    """The tenth percentile."""
    high: float
    """The ninetieth percentile."""
    count: int
    """Values."""


def spread(values: Sequence[float]) -> Spread:
    """Median, tenth and ninetieth percentile of at least one value."""
    low, high = np.percentile(values, (10, 90))
    return Spread(statistics.median(values), float(low), float(high), len(values))


def interleave[K, T](contenders: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Calls each contender once a round, in turn, so that what slows the machine for a while slows all of them.

    Args:
        contenders: what to call, each under its name.
        rounds: calls of each.

    Returns:
        For each name what its calls returned, a value a round.
    """
    results: dict[K, list[T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            results[name].append(call())
    return results


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds until what a call returns is there: JAX returns before its arrays are."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def environment() -> dict[str, str]:
    """What a number depends on besides the code: date, processor, devices, versions, flags."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float | Spread]]) -> None:
    """Prints a table; numbers with four digits, a spread as its median and what lies around it."""
    table = Table(*map(escape, columns), title=escape(title))
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    Console().print(table)


def write_numbers(path: Path, numbers: Mapping[str, object]) -> None:
    """Writes numbers as JSON, with what they were measured on; a `Spread` among them becomes an object."""

    def plain(value: object) -> object:
        assert isinstance(value, Spread), f"{value!r} is no JSON"
        return asdict(value)

    path.write_text(json.dumps({"environment": environment(), **numbers}, indent=1, default=plain) + "\n")


def _cell(value: str | float | Spread) -> str:
    match value:
        case str():
            return value
        case Spread():
            return f"{value.median:.4g} [{value.low:.4g}, {value.high:.4g}]"
        case _:
            return f"{value:.4g}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
