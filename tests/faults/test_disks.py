"""F6, F8, F44: disks that are full or may not be written to. They are mounted, so only root can run this."""

import shutil
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from grug_native.data.corpus import local_text_data
from grug_native.launch.text_run import text_run
from tests.faults.runs import ForkServer, Run
from tests.fixtures_data import make_text

pytestmark = pytest.mark.slow_faults


@contextmanager
def mounted(folder: Path, *options: str) -> Generator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_f06_a_disk_that_fills_up(server: ForkServer, whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with mounted(folder, "-t", "tmpfs", "-o", "size=20m", "tmpfs"):
        run = server.run(folder / "run")
        process = run.start("stop@step:4")
        process.until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        free = shutil.disk_usage(folder).free
        (folder / "junk").write_bytes(bytes(free - 100_000))
        process.send(signal.SIGCONT)
        process.wait().expect(1, "No space left on device")
        kept = run.steps
        assert kept[0] in (2, 4) and run.digests()
        run.fit().expect(1, "[Errno 28]", str(run.folder), "change output_path")
        (folder / "junk").unlink()
        run.fit().expect(0, f"resuming from {run.step(kept[0])}")
        run.expect_equal(whole)
        assert run.names() == whole.names()


def test_f08_a_disk_that_may_not_be_written_to(half: Run, whole: Run) -> None:
    with mounted(half.folder, "--bind", str(half.folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(half.folder)], check=True)
        said = half.fit().expect(1, "Read-only file system", str(half.folder))
        assert "first step after" not in said
    half.fit().expect(0)
    half.expect_equal(whole)


def test_f44_a_disk_that_fills_up_while_a_corpus_is_made(tmp_path: Path) -> None:
    """Once with the texts, once with the tokens."""
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("".join(make_text(10 * number + part, 4000) for part in range(10)))
    for size in ("1200k", "1750k"):
        with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
            corpora = tmp_path / "disk" / "corpora"
            with pytest.raises(OSError, match="No space left on device: what was made of the corpus is removed; free"):
                local_text_data({"all": sorted(tmp_path.glob("*.txt"))}, cache_dir=corpora, vocab_size=300)
            assert list(corpora.iterdir()) == []


def test_f44_texts_on_a_disk_that_may_not_be_written_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "one.txt").write_text(make_text(0, 40_000))
    with mounted(tmp_path / "disk", "--bind", str(tmp_path / "disk")):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "disk")], check=True)
        with (
            caplog.at_level("INFO"),
            pytest.raises(OSError, match=r"no corpus can be made there \(Read-only file system"),
        ):
            text_run(tmp_path / "disk", runs=tmp_path / "disk" / "runs")
        assert "read 1 .txt" not in caplog.text
