"""What a finished run amounts to: `speedrun_results.json` in its folder, read from what the run wrote."""

import json
import math
import re
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import jax
from rich.console import Console
from rich.table import Table

from grug_native.bucket.place import checkpoints_of, fetched, read_file, write_file
from grug_native.checkpoint.run_place import settings_hash
from grug_native.config import GrugNativeRunConfig, config_to_dict
from grug_native.host.run_folder import RESULTS_FILE
from grug_native.metrics import flops_per_token, parameter_counts
from grug_native.tracking.jsonl import METRICS_FILE, MetricRow, read_metrics

_HELD_OUT = tuple(f"{macro}{name}" for macro in ("", "macro_") for name in ("loss", "bpb", "bpb_exact"))


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """A finished run in numbers."""

    run_id: str
    """Name of the run."""
    config_hash: str
    """SHA-256 of the resolved config, but for where things are and the run's name."""
    parameters: int
    """Weights of the model."""
    steps: int
    """Updates done."""
    tokens: int
    """Token positions trained on."""
    model_flops: float
    """Floating-point operations of the whole training, attention counted over the full square."""
    first: Mapping[str, float]
    """By metric name, the training loss of the first step, and each held-out loss, bits per byte and task score of the
    first evaluation."""
    final: Mapping[str, float]
    """The same of the last step and the last evaluation."""
    training_seconds: float
    """Time of all logged steps together, over all processes that the run took; compilation included."""
    tokens_per_second: float
    """Over all devices: the median of the logged steps."""
    peak_memory_gib: float
    """Most memory that the process which finished the run held on its host."""
    hardware: Mapping[str, str | int]
    """`platform`, `device`, `devices`, and `processes` of what finished the run."""
    versions: Mapping[str, str]
    """Versions of the packages that wrote the last checkpoint."""


def summarize_run(config: GrugNativeRunConfig) -> RunResults:
    """Reads the folder of a run that has just finished in this process.

    Raises:
        ValueError: if the run has not done all its steps.
    """
    place, steps = config.output_path, config.trainer.num_train_steps
    checkpoints = checkpoints_of(place)
    saved = checkpoints.steps()
    if not saved or saved[0] != steps:
        raise ValueError(f"{place} is at step {saved[0] if saved else 0} of {steps}: only a finished run has results")
    metadata = checkpoints.find(steps).read_metadata()
    rows = read_metrics(fetched(place, [METRICS_FILE]) / METRICS_FILE)
    tokens = config.trainer.data_offset(steps) * config.seq_len
    devices = jax.devices()
    return RunResults(
        run_id=config.run_id,
        config_hash=settings_hash(config_to_dict(config)),
        parameters=parameter_counts(config.model)["total"],
        steps=steps,
        tokens=tokens,
        model_flops=tokens * flops_per_token(config.model, config.seq_len).full,
        first=_scores(reversed(rows)),
        final=_scores(rows),
        training_seconds=math.fsum(_numbers(rows, "throughput/duration")),
        tokens_per_second=median(_numbers(rows, "throughput/tokens_per_second")),
        # Linux counts it in KiB.
        peak_memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        hardware={
            "platform": devices[0].platform,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "processes": jax.process_count(),
        },
        versions=metadata.versions,
    )


def write_results(results: RunResults, output_path: str | Path) -> str:
    """Writes `speedrun_results.json`, whole or not at all; returns where it is."""
    write_file(str(output_path), RESULTS_FILE, (json.dumps(asdict(results), indent=1) + "\n").encode())
    return f"{output_path}/{RESULTS_FILE}"


def find_results(output_path: str | Path) -> RunResults | None:
    """Reads the results of a finished run; None if there are none."""
    found = read_file(str(output_path), RESULTS_FILE)
    return None if found is None else RunResults(**json.loads(found))


def read_results(output_path: str | Path) -> RunResults:
    """Reads the results of a finished run.

    Raises:
        FileNotFoundError: if there are none.
    """
    if (found := find_results(output_path)) is None:
        raise FileNotFoundError(f"{output_path} has no {RESULTS_FILE}: the run has not finished")
    return found


def print_results(results: RunResults, folder: str) -> None:
    """Prints a finished run as a table: losses, bits per byte by domain, task scores, speed; and where things are."""
    table = Table("", "first", "last", title=f"{results.run_id} after {results.steps:,} steps")
    known = {"train/loss": "training loss", "eval/loss": "held-out loss", "eval/bpb_exact": "held-out bits per byte"}
    tags = [name[5:-10] for name in results.final if re.fullmatch("eval/(?!ema/|macro_).*/bpb_exact", name)]
    leaves = [tag for tag in tags if not any(other.startswith(f"{tag}/") for other in tags)]
    known |= {f"eval/{tag}/bpb_exact": f"  {tag}" for tag in leaves}
    known |= {"eval/ema/loss": "held-out loss, averaged", "eval/ema/bpb_exact": "held-out bits per byte, averaged"}
    known |= {name: name for name in results.final if name.startswith("lm_eval/")}
    for name, label in known.items():
        if name in results.final:
            first = results.first.get(name)
            table.add_row(label, "" if first is None else f"{first:.4f}", f"{results.final[name]:.4f}")
    table.add_section()
    table.add_row("parameters", "", f"{results.parameters:,}")
    table.add_row("tokens", "", f"{results.tokens:,}")
    table.add_row("model FLOPs", "", f"{results.model_flops:.3g}")
    table.add_row("seconds of steps", "", f"{results.training_seconds:,.0f}")
    table.add_row("tokens/s", "", f"{results.tokens_per_second:,.0f}")
    table.add_row("memory of the host", "", f"{results.peak_memory_gib:.2f} GiB")
    Console().print(table)
    print(f"{folder}: curves in loss.png, every step in metrics.jsonl, all metrics in {RESULTS_FILE}")


def _numbers(rows: Sequence[MetricRow], name: str) -> list[float]:
    return [float(row[name]) for row in rows if name in row]


def _scores(rows: Iterable[MetricRow]) -> dict[str, float]:
    last = {name: value for row in rows for name, value in row.items()}

    def is_score(name: str) -> bool:
        held_out = name.startswith("eval/") and name.rsplit("/", 1)[-1] in _HELD_OUT
        return held_out or name == "train/loss" or name.startswith("lm_eval/")

    return {name: float(last[name]) for name in sorted(filter(is_score, last))}
