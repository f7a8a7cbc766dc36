import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from grug_native.tracking.plot import plot_runs, write_picture

type Row = Mapping[str, float | str]


def write_run(folder: Path, rows: Sequence[Row]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_run(folder: Path, steps: int, *, level: float = 3.0) -> Path:
    rows: list[Row] = []
    for step in range(steps):
        if step % 50 == 0:
            bpb = {f"eval/{tag}bpb_exact": level / 2 for tag in ("", "python/", "python/code/", "python/docs/")}
            rows.append({"step": step, "eval/loss": level, **bpb})
        loss = level + math.exp(-step / 50)
        rows.append(
            {
                "step": step,
                "train/loss": "NaN" if step == 7 else loss,
                "optim/learning_rate": 1e-3,
                "grad/norm/total": 40.0 if step == 9 else 1.0,
                "throughput/tokens_per_second": 1000.0,
                "mixture/weight/python/code": 0.5,
                "mixture/weight/python/docs": 0.5,
            }
        )
    return write_run(folder, rows)


def labels(axes: Axes) -> list[str]:
    """The legend's, without the value at the end that stands behind each."""
    return [label.rsplit("  ", 1)[0] for label in axes.get_legend_handles_labels()[1]]


def test_one_run_has_every_curve(tmp_path: Path) -> None:
    loss, bpb, rate, norm, speed, mixture = plot_runs([make_run(tmp_path / "a", 200)]).axes
    assert labels(loss) == ["training", "held out"]
    # The leaves of the tags, and the total; not what lies between.
    assert labels(bpb) == ["all", "python/code", "python/docs"]
    assert labels(mixture) == ["python/code", "python/docs"]
    assert [axes.has_data() for axes in (rate, norm, speed)] == [True] * 3
    assert norm.get_yscale() == "log"
    # The last value stands beside each name; what is mostly constant is drawn from zero on.
    assert bpb.get_legend_handles_labels()[1][0] == "all  1.5"
    assert [axes.get_ylim()[0] for axes in (rate, speed, mixture)] == [0, 0, 0]
    pale, smooth = loss.lines[:2]
    assert np.shape(pale.get_xydata()) == (200, 2)
    assert np.shape(smooth.get_xydata()) == (60, 2)


def test_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", 20), make_run(tmp_path / "b", 30, level=4.0)]
    loss, bpb, rate, *_ = plot_runs(folders).axes
    assert labels(loss) == ["a, training", "a, held out", "b, training", "b, held out"]
    assert [np.asarray(line.get_ydata())[-1] for line in loss.lines] == pytest.approx(
        [3 + math.exp(-19 / 50), 3, 4 + math.exp(-29 / 50), 4]
    )
    assert len(bpb.lines) == 6
    assert len(rate.lines) == 2


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "run", 5) for parent in ("x", "y")]
    assert labels(plot_runs(folders).axes[2]) == [str(folder) for folder in folders]


def test_what_was_not_logged_is_said_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [{"step": 0, "train/loss": 2.0}])
    texts = [[text.get_text() for text in axes.texts] for axes in plot_runs([folder]).axes]
    assert texts == [[], *[["not logged"]] * 5]


def test_the_picture_is_written_whole(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 100)
    write_picture(plot_runs([folder]), folder / "loss.png")
    assert sorted(path.name for path in folder.iterdir()) == ["loss.png", "metrics.jsonl"]
    picture = imread(folder / "loss.png")
    assert picture.shape[:2] == (880, 1650)
    assert len({tuple(pixel) for pixel in picture[::20, ::5].reshape(-1, picture.shape[2])}) > 5


def test_a_picture_without_a_suffix_is_refused(tmp_path: Path) -> None:
    figure = plot_runs([make_run(tmp_path / "a", 10)])
    with pytest.raises(ValueError, match=r"picture has no suffix to say .*: give .*picture\.png"):
        write_picture(figure, tmp_path / "picture")
    with pytest.raises(ValueError, match="'xyz' is not supported"):
        write_picture(figure, tmp_path / "picture.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        plot_runs([tmp_path])
    with pytest.raises(ValueError, match="logged nothing yet"):
        plot_runs([write_run(tmp_path / "a", [])])
