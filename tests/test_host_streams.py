"""In processes of their own: what is lost here is a real pipe."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import os, sys, warnings
from tqdm import tqdm
from grug_native.tracking.progress import configure_logging, logger
configure_logging()
while not os.path.exists(sys.argv[1]): pass
for number in range(100):
    print("to stdout", flush=True)
    logger.info("to stderr")
    warnings.warn(f"warning {number}")
    tqdm([number], leave=True).close()
print("in the buffer when it ends" * 1000)
open(sys.argv[1], "a").write("done")
"""


def test_a_process_outlives_its_readers(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with subprocess.Popen(
        [sys.executable, "-c", CODE, str(go)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        go.touch()
        assert process.wait(timeout=100) == 0
    assert go.read_text() == "done"


def test_a_process_that_is_started_without_them_lives_too(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    command = f'exec "{sys.executable}" -c "$CODE" "{go}" >&- 2>&-'
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"CODE": CODE}, timeout=100, check=False)
    assert (done.returncode, go.read_text()) == (0, "done")
