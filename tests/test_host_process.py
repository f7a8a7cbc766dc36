import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grug_native.host.process import GPU_FLAGS, with_gpu_flags

PROGRAM = """
import os, sys
from grug_native.host.process import prepare_process
print(os.getpid(), flush=True)
prepare_process()
print(os.getpid(), os.environ["GLIBC_TUNABLES"], os.environ["JAX_COMPILATION_CACHE_DIR"],
      os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"], sys.argv[1:], flush=True)
"""


def run(tmp_path: Path, **variables: str) -> list[str]:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    kept = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "XDG_CACHE_HOME")}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        kept.pop(name, None)
    command = [sys.executable, "-W", "error", str(file), "an argument", "--flag"]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has such settings")
def test_a_program_is_started_again_once_with_huge_pages(tmp_path: Path) -> None:
    first, again, last = run(tmp_path, XDG_CACHE_HOME="somewhere")
    assert first == again
    assert last == f"{first} glibc.malloc.hugetlb=1 somewhere/grug_native/xla 0 ['an argument', '--flag']"


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    first, last = run(
        tmp_path, GLIBC_TUNABLES="", JAX_COMPILATION_CACHE_DIR="mine", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="2"
    )
    assert last == f"{first}  mine 2 ['an argument', '--flag']"


def interrupted(main: str, after: str = "ready") -> tuple[int, str]:
    """What becomes of a program that is sent SIGINT once it has said `after`."""
    start = "import time\nfrom grug_native.host.process import end_at_ctrl_c\nend_at_ctrl_c()\n"
    command = [sys.executable, "-c", start + main]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == f"{after}\n"
        child.send_signal(signal.SIGINT)
        try:
            said, _ = child.communicate(timeout=20)
        finally:
            child.kill()
    return child.returncode, said


def test_ctrl_c_ends_foreign_code() -> None:
    foreign = "import hashlib\nprint('ready', flush=True)\nhashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)"
    assert interrupted(foreign) == (130, "")


def test_ctrl_c_raises_nothing_that_could_be_swallowed() -> None:
    program = """
try:
    print("ready", flush=True)
    time.sleep(100)
finally:
    print("unwound", flush=True)
"""
    assert interrupted(program) == (130, "")


def test_ctrl_c_has_things_tidied_and_what_was_written_shown() -> None:
    program = """
from grug_native.host.process import tidied_at_ctrl_c
with tidied_at_ctrl_c(lambda: print("tidied")):
    pass
with tidied_at_ctrl_c(lambda: time.sleep(100)), tidied_at_ctrl_c(lambda: print("tidied")):
    print("ready", flush=True)
    time.sleep(100)
"""
    assert interrupted(program) == (130, "tidied\n")


def test_ctrl_c_that_is_ignored_stays_so() -> None:
    program = """
import signal
from grug_native.host.process import end_at_ctrl_c
signal.signal(signal.SIGINT, signal.SIG_IGN)
end_at_ctrl_c()
signal.raise_signal(signal.SIGINT)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_settings_for_a_gpu_leave_those_of_the_user_alone() -> None:
    (flag,) = GPU_FLAGS
    assert with_gpu_flags("") == flag
    assert with_gpu_flags("--xla_dump_to=x") == f"--xla_dump_to=x {flag}"
    mine = flag.replace("false", "true")
    assert with_gpu_flags(mine) == mine


def test_xla_knows_the_settings_for_a_gpu() -> None:
    program = "import jax; jax.jit(lambda x: x + 1)(1)"  # An unknown one ends the process.
    environment = {**os.environ, "XLA_FLAGS": with_gpu_flags(""), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
