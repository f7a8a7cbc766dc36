"""What all tests share: four fake CPU devices, no network, compiled programs, one small corpus and one small run."""

import os
import sys
import tempfile

FOLDER = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
"""What is kept as long as the session lasts; held by the process that starts all others."""

# Before anything imports jax or a hub client.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"
# In a collective each device blocks a thread of XLA's pool; with none to spare, any other work would deadlock it.
os.environ["NPROC"] = "16"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# What one process of a worker has compiled, its others load: a small model compiles far longer than it trains.
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

pytest_plugins = ["tests.fixtures_data", "tests.fixtures_run"]


def pytest_unconfigure() -> None:
    if FOLDER is not None:
        FOLDER.cleanup()
