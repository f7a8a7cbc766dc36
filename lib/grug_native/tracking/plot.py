"""Curves of one run or several, from their `metrics.jsonl`: no display, no account, no state of matplotlib's own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grug_native.tracking.jsonl import METRICS_FILE, MetricRow, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILE = "loss.png"
"""Name of the picture in the folder of a run."""

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
_DASHES = ("-", "--", ":", "-.")
_SMOOTH_POINTS = 60
"""A noisy curve of more points than this is drawn pale, under one of so many points."""
_MARKED_POINTS = 30
"""The points of a curve of so few can be told apart."""


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    metrics: tuple[str, ...]
    smooth: bool = False
    log: bool = False
    bottom: int | None = None


_PANELS = (
    _Panel("Loss", "nats a token", ("train/loss", "eval/loss"), smooth=True),
    _Panel("Held-out bits per byte", "bits a byte", ("/bpb_exact", "/bpb")),
    _Panel("Learning rate", "", ("optim/learning_rate",), bottom=0),
    _Panel("Gradient norm, before clipping", "L2", ("grad/norm/total",), smooth=True, log=True),
    _Panel("Throughput", "tokens/s", ("throughput/tokens_per_second",), smooth=True, bottom=0),
    _Panel("Mixture", "share", ("mixture/weight/",), bottom=0),
)


def plot_runs(folders: Sequence[Path]) -> "Figure":
    """Draws loss, held-out bits per byte by domain, learning rate, gradient norm, speed and mixture over the steps.

    Args:
        folders: of the runs; they are laid over each other.

    Returns:
        A figure; `figure.savefig(path)` writes it, and a notebook shows it.

    Raises:
        ValueError: if a folder has no metrics.
    """
    from matplotlib.figure import Figure

    runs = {name: _read(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    figure = Figure(figsize=(15, 8), layout="constrained", dpi=110)
    for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        _draw(axes, panel, runs)
    figure.suptitle(", ".join(runs), fontsize=13)
    return figure


def write_picture(figure: "Figure", path: Path) -> None:
    """Writes a figure, whole or not at all; the suffix of `path` says as what kind of picture.

    Raises:
        ValueError: if there is no suffix, or none that matplotlib knows.
    """
    if not path.suffix:
        raise ValueError(f"{path} has no suffix to say what kind of picture it is to be: give {path}.png")
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    figure.savefig(partial)
    partial.replace(path)


def _names(folders: Sequence[Path]) -> Iterator[str]:
    short = [folder.resolve().name for folder in folders]
    return iter(short if len(set(short)) == len(short) else [str(folder) for folder in folders])


def _read(folder: Path) -> list[MetricRow]:
    file = folder / METRICS_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {METRICS_FILE}: give the folder of a run that has trained")
    rows = read_metrics(file)
    if not rows:
        raise ValueError(f"{file} is empty: the run has logged nothing yet")
    return rows


def _draw(axes: "Axes", panel: _Panel, runs: dict[str, list[MetricRow]]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    by_domain = panel.metrics[0].startswith("/")
    for number, (run, rows) in enumerate(runs.items()):
        for position, metric in enumerate(_metrics(panel, rows)):
            steps, values = _series(rows, metric)
            name = _label(panel, metric, run if len(runs) > 1 else "")
            # Of several runs each has a colour, except where there are many curves to a run.
            by_run = len(runs) > 1 and not by_domain
            colour = _COLOURS[(number if by_run else position) % len(_COLOURS)]
            dash = _DASHES[(number if by_domain else position) % len(_DASHES)]
            if panel.smooth and len(steps) > _SMOOTH_POINTS:
                axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
                steps, values = _smoothed(steps, values)
            label = f"{name}  {values[-1]:.4g}".strip()
            marker = "." if len(steps) <= _MARKED_POINTS else ""
            axes.plot(steps, values, dash, color=colour, label=label, linewidth=1.6, marker=marker)
    axes.set_title(panel.title, fontsize=11)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    if not axes.has_data():
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="gray")
    else:
        axes.legend(fontsize=8, frameon=False, title="at the end", title_fontsize=8, alignment="left")
    low, high = axes.dataLim.intervaly
    if panel.bottom is not None and axes.has_data():
        axes.set_ylim(bottom=panel.bottom)
    if panel.log and 0 < 5 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def _metrics(panel: _Panel, rows: list[MetricRow]) -> list[str]:
    """The names of a panel's curves; of bits per byte, the exact ones if there are any, of all and of each domain."""
    known = list(dict.fromkeys(name for row in rows for name in row))
    for wanted in panel.metrics if panel.metrics[0].startswith("/") else ():
        found = [name for name in known if name.endswith(wanted) and not name.startswith("eval/ema/")]
        if found:
            tags = [name.removesuffix(wanted) for name in found]
            parents = {tag for tag in tags if tag != "eval" and any(other.startswith(f"{tag}/") for other in tags)}
            return [f"{tag}{wanted}" for tag in tags if tag not in parents]
    return [name for wanted in panel.metrics for name in known if name.startswith(wanted)]


def _label(panel: _Panel, metric: str, run: str) -> str:
    if panel.metrics[0].startswith("/"):
        metric = metric.removeprefix("eval/").removeprefix("bpb_exact").removeprefix("bpb") or "all"
        metric = metric.rsplit("/", 1)[0]
    elif metric.startswith("mixture/weight/"):
        metric = metric.removeprefix("mixture/weight/")
    else:
        metric = {"train/loss": "training", "eval/loss": "held out"}.get(metric, "")
    return ", ".join(part for part in (run, metric) if part)


def _series(rows: list[MetricRow], metric: str) -> tuple[np.ndarray, np.ndarray]:
    points = np.array([(float(row["step"]), float(row[metric])) for row in rows if metric in row])
    return points[:, 0], np.where(np.isfinite(points[:, 1]), points[:, 1], np.nan)


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians of equally many neighbouring points, which outliers do not move."""
    pieces = [piece for piece in np.array_split(np.arange(len(values)), _SMOOTH_POINTS) if piece.size]
    whole = [piece for piece in pieces if np.isfinite(values[piece]).any()]
    return np.array([steps[piece].mean() for piece in whole]), np.array(
        [np.nanmedian(values[piece]) for piece in whole]
    )
