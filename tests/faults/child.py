"""What a forked process does: one `fit()` as a script would run it.

This module is imported once, into the fork server; so it imports all that a run needs, and uses no device.
"""

import gc
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import jax
from jaxlib.mlir.dialects import mhlo
from levanter.distributed import DistributedConfig as DistributedConfig
from levanter.optim.config import OptimizerConfig as OptimizerConfig
from levanter.tracker import TrackerConfig as TrackerConfig
from matplotlib import figure
from matplotlib.backends import backend_agg
from orbax.checkpoint import v1 as ocp

from grug_native import loop, saving
from grug_native.bucket import checkpointer as bucket_checkpointer
from grug_native.cli import commands
from grug_native.cli import main as cli
from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig, load_config, save_config
from grug_native.data import cache as token_cache
from grug_native.data import corpus_store
from grug_native.data import loader as data
from grug_native.data.corpus import local_text_data
from grug_native.evaluation import generate as sample
from grug_native.evaluation import perplexity as eval_hooks
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.host.process import end_at_ctrl_c
from grug_native.host.signals import ExitCode
from grug_native.launch.exit_codes import explain
from grug_native.launch.job import initialize_distributed
from grug_native.optimizer import AdamWConfig
from grug_native.runner import GrugRunner
from grug_native.schedule import ScheduleConfig
from grug_native.tracking import plot
from grug_native.tracking.progress import configure_logging
from tests.faults.runs import NUM_STEPS, Job
from tests.fixtures_data import make_text
from tests.fixtures_run import SMALL_MODEL

PRELOADED = (
    backend_agg,
    bucket_checkpointer,
    commands,
    corpus_store,
    data,
    eval_hooks,
    figure,
    loop,
    mhlo,
    ocp,
    plot,
    sample,
    saving,
    token_cache,
)

gc.freeze()  # What is here now is shared with the forks, as long as nobody counts its references.


def fit(job: Job) -> None:
    """Runs `fit()`, and ends the process as a script does."""
    descriptor = os.open(job.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Under nohup it would be ignored.
    if job.directory is not None:
        os.chdir(job.directory)
    os.environ.update(job.environment)
    os.environ.setdefault("NPROC", "64")
    jax.config.update("jax_num_cpu_devices", job.devices)
    if job.xla_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(job.xla_cache))
    configure_logging()
    if job.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.largest_file, job.largest_file))
    if job.directory is not None:
        os.chdir(job.directory)
    if job.command:
        end_at_ctrl_c()
        sys.exit(cli.main(job.command))
    try:
        initialize_distributed()
        runner = GrugRunner(load_config(job.config))
        if job.cell is None:
            runner.fit(stop_after=job.stop_after, resume_step=job.resume_step)
        else:
            _run_cell(job.cell, runner)
    except Exception as error:  # noqa: BLE001 - this is where the script ends
        traceback.print_exc()
        found = explain(error)
        sys.exit(ExitCode.FAILED if found is None else found[0])


def _run_cell(cell: str, runner: GrugRunner) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.push({"runner": runner})
    shell.run_cell(cell).raise_error()


def make_base_runs(folder: Path) -> None:
    """Writes the texts, their token caches, and `plain.yaml` and `eval.yaml` under `folder`."""
    for domain, first, number in (("caves", 0, 12), ("clubs", 100, 6)):
        (folder / domain).mkdir()
        for seed in range(first, first + number):
            (folder / domain / f"{seed}.txt").write_text(make_text(seed, 400))
    for name, fraction in (("plain", 0.0), ("eval", 0.2)):
        corpus = local_text_data(
            {"caves": folder / "caves", "clubs": folder / "clubs"},
            cache_dir=folder / f"corpus-{name}",
            vocab_size=300,
            validation_fraction=fraction,
            mixture_block_size=8,
        )
        evaluated = fraction > 0
        config = GrugNativeRunConfig(
            model=SMALL_MODEL,
            data=corpus,
            optimizer=AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=2)),
            trainer=GrugTrainerConfig(
                num_train_steps=NUM_STEPS,
                train_batch_size=4,
                steps_per_checkpoint=2,
                minutes_per_temporary_checkpoint=None,
                ema_beta=0.9 if evaluated else None,
            ),
            eval=GrugEvalConfig(steps_per_eval=2 if evaluated else None, max_eval_batches=1),
            output_path=str(folder / "runs" / name),
        )
        save_config(config, folder / f"{name}.yaml")
