"""Runs as jobs of an Iris cluster, which the test starts on loopback and stops. Each task is a process of its own."""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig
from grug_native.host.run_folder import committed_steps
from grug_native.optimizer import AdamWConfig
from grug_native.runner import GrugRunner
from grug_native.schedule import ScheduleConfig
from grug_native.tracking.jsonl import read_metrics
from tests.fixtures_run import SMALL_MODEL
from tests.tolerance import assert_close, loss_terms

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig
    from marin.execution.lazy import ArtifactStep, StepContext

    from grug_native.launch.marin import GrugRun


# Iris leaves the pipes of the processes that it starts to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of this machine, with a shared folder."""
    from iris.cluster.local_cluster import LocalCluster, make_local_cluster_config
    from rigging import credential_store

    shared = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARIN_PREFIX", str(shared))
        patch.setenv("IRIS_USER", "grug")
        patch.setenv("LOGNAME", "grug")
        # A sum over devices may differ in its last bit from run to run; with one there is none.
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        patch.setattr(credential_store, "_CREDENTIALS_DIR", shared / "credentials")
        local = LocalCluster(make_local_cluster_config(max_workers=2))
        try:
            yield local.start()
        finally:
            local.close()
            gc.collect()


def small_run(data: "LmDataConfig", output_path: str, steps: int) -> GrugNativeRunConfig:
    return GrugNativeRunConfig(
        model=SMALL_MODEL,
        data=data,
        optimizer=AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=1)),
        trainer=GrugTrainerConfig(num_train_steps=steps, train_batch_size=8, steps_per_checkpoint=max(2, steps // 20)),
        output_path=output_path,
    )


def make_step(name: str, data: "LmDataConfig", steps: int, *, tasks: int) -> "ArtifactStep[GrugRun]":
    from fray.types import ResourceConfig

    from grug_native.launch.marin import training_step

    def build(ctx: "StepContext") -> GrugNativeRunConfig:
        return small_run(data, ctx.output_path, steps)

    resources = ResourceConfig.with_cpu(cpu=1, ram="1g", disk="1g", replicas=tasks)
    return training_step(name, build, resources=resources)


def losses(folder: Path) -> list[float]:
    return [float(row["train/loss"]) for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


def kill_at_first_checkpoint(folder: Path, killed: list[int]) -> None:
    deadline = time.monotonic() + 240
    while not committed_steps(folder / "checkpoints"):
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)
    marker = f"--config={folder}/job.yaml"
    for process in psutil.process_iter(["cmdline"]):
        if marker in (process.info["cmdline"] or ()):
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_a_task_killed_in_the_middle_is_retried_and_the_run_is_as_if_nothing_had_happened(
    cluster: str, small_corpus: "LmDataConfig"
) -> None:
    from grug_native.launch.marin import run_steps

    broken, unbroken = (make_step(name, small_corpus, 200, tasks=1) for name in ("killed", "unbroken"))
    folder, killed = Path(broken.path()), list[int]()
    killer = threading.Thread(target=kill_at_first_checkpoint, args=(folder, killed))
    killer.start()
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda step: run_steps(step, cluster=cluster), (broken, unbroken)))
    killer.join()
    assert len(killed) == 1
    assert runs[0].final == runs[1].final
    assert losses(folder) == losses(Path(runs[1].path))


@pytest.mark.timeout(600)
def test_a_gang_of_two_tasks_trains_one_model(cluster: str, small_corpus: "LmDataConfig", tmp_path: Path) -> None:
    from grug_native.launch.marin import run_steps

    run = run_steps(make_step("gang", small_corpus, 6, tasks=2), cluster=cluster)
    assert run.hardware["processes"] == 2 and run.hardware["devices"] == 2
    alone = tmp_path / "alone"
    GrugRunner(small_run(small_corpus, str(alone), 6)).fit()
    assert_close(losses(Path(run.path)), losses(alone), terms=6 * loss_terms(SMALL_MODEL, 4 * 32, 32))
