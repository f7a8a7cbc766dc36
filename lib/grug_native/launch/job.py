"""A run as a job: `python -m grug_native.launch.job --config=FILE` in each process of a cluster, or a call in this one.

SLURM, TPU pods and Iris are found by levanter's `DistributedConfig`. Elsewhere, several processes are told of each
other by `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
"""

import argparse
import logging
import os
from collections.abc import Sequence

import jax
from jax.experimental import multihost_utils

from grug_native.checkpoint.run_place import settings_hash
from grug_native.components import load_tokenizer
from grug_native.config import GrugNativeRunConfig, config_to_dict, load_config
from grug_native.host.process import end_at_ctrl_c, prepare_process
from grug_native.launch.exit_codes import explained_exit
from grug_native.launch.summary import RunResults, find_results, summarize_run, write_results
from grug_native.runner import GrugRunner
from grug_native.tracking.progress import configure_logging

PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that tell the processes of a job of each other."""

logger = logging.getLogger(__name__)


def initialize_distributed() -> None:
    """Joins the processes of a job, before anything uses a device; without a cluster or variables, does nothing.

    Raises:
        ValueError: if some of the three variables are set, and not all.
    """
    from levanter.distributed import DistributedConfig

    address, number, index = (os.environ.get(name) for name in PROCESS_VARIABLES)
    if address is not None and number is not None and index is not None:
        config = DistributedConfig(coordinator_address=address, num_processes=int(number), process_id=int(index))
    elif number is None and index is None:
        config = DistributedConfig()
    else:
        missing = ", ".join(name for name in PROCESS_VARIABLES if name not in os.environ)
        raise ValueError(f"of {', '.join(PROCESS_VARIABLES)} only some are set: set {missing} too, or none of them")
    config.initialize()
    logger.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())


def train_to_results(config: GrugNativeRunConfig) -> RunResults:
    """Trains to the end, from wherever the run is, and writes `speedrun_results.json`; every process calls it.

    A run which the same config has finished before is left alone.

    Raises:
        ValueError: if the tokenizer is not to be had, or whatever else `GrugRunner.fit` refuses.
    """
    runner = GrugRunner(config)
    config = runner.config
    found = find_results(config.output_path)
    if found is not None and found.config_hash == settings_hash(config_to_dict(config)):
        logger.info("finished before, after %d steps: %s", found.steps, config.output_path)
        return found
    load_tokenizer(config.data)
    runner.fit()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("grug-run-is-on-disk")  # The others may be here before process 0 has saved.
    results = summarize_run(config)
    if jax.process_index() == 0:
        logger.info("finished after %d steps: %s", results.steps, write_results(results, config.output_path))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what a config file says, as one process of a job; exits with a `grug_native.host.signals.ExitCode`."""
    parser = argparse.ArgumentParser(prog="python -m grug_native.launch.job", description=main.__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run, as in a run's folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parsed = parser.parse_args(arguments)
    configure_logging()
    with explained_exit("grug_native.launch.job", debug=parsed.debug):
        initialize_distributed()
        train_to_results(load_config(parsed.config))


if __name__ == "__main__":
    end_at_ctrl_c()
    prepare_process()
    main()
