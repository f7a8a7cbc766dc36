"""What all tests share: four fake CPU devices, no network, compiled programs, one small corpus and one small run."""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

FOLDER = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
"""What is kept as long as the session lasts; held by the process that starts all others."""

# Before anything imports jax or a hub client.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
# In a collective each device blocks a thread of XLA's pool, and a program may have several collectives at once; with no
# thread to spare, all of them wait for ever.
os.environ["NPROC"] = "64"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Code that is made fast, as a test compiles far longer than it computes; whoever wants other code says so.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# What one process has compiled, the next ones load: a small model compiles far longer than it trains.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Without a bound JAX takes no lock, and reads what another process has half written.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**34)
if FOLDER is not None:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{FOLDER.name}/programs"
    if sys.dont_write_bytecode:
        # Nothing is written beside the sources; but each process would compile the libraries anew, for ten seconds.
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = f"{FOLDER.name}/bytecode"
        sys.dont_write_bytecode = False
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
else:
    # A folder for each worker: on a busy machine they would wait for each other's lock longer than JAX has patience.
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{os.environ['PYTEST_XDIST_WORKER']}"

import jax  # noqa: E402 - it reads the settings above

# For the bound JAX looks at all programs before it adds one, and a worker has thousands. Its own need none: the
# processes that it starts have another folder.
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"] + "-own")
jax.config.update("jax_compilation_cache_max_size", -1)

gc.set_threshold(100_000, 50, 100)  # JAX keeps millions of objects, and to scan them again and again takes a sixth.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # As in the background of a script; what is started inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("test_variants.py", "test_train.py", "test_lowering.py")
"""Files that come first, lest one worker be left alone with them; then come the folders, whose tests are long."""

MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000
"""A compiled program takes eight of a process's memory mappings. Linux has 65,530 for each process, past which XLA ends
in a segmentation fault, and a worker compiles thousands of programs."""

pytest_plugins = ["tests.fixtures_data", "tests.fixtures_run"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Generator[None]:
    """Lets go of what the files before have compiled, once it is much."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_unconfigure() -> None:
    if FOLDER is not None:
        FOLDER.cleanup()
