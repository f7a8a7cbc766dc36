"""What all tests share: four fake CPU devices, no network, compiled programs, one small corpus and one small run."""

import os
import shutil
import tempfile

FIRST = "PYTEST_XDIST_WORKER" not in os.environ
"""Whether this is the process that the others, if any, are started from."""

# Before anything imports jax or a hub client.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
# In a collective each device blocks a thread of XLA's pool; with none to spare, any other work would deadlock it.
os.environ["NPROC"] = "16"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# What one process has compiled, all others load; compiling takes most of a test's time else. Each session starts anew.
if FIRST:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grug-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Without a bound JAX takes no lock, and reads what another process has half written.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**34)

pytest_plugins = ["tests.fixtures_data", "tests.fixtures_run"]


def pytest_unconfigure() -> None:
    if FIRST:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])
