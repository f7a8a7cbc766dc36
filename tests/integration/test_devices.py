"""The same run on one device, on many, and on several processes: same batches, same losses, state handed over whole."""

import socket
from pathlib import Path
from typing import Any

import pytest

from grug_native.host.run_folder import quarantined
from grug_native.tracking.jsonl import METRICS_FILE, read_metrics
from tests.faults.runs import ForkServer, Run
from tests.fixtures_run import SMALL_MODEL
from tests.tolerance import assert_close, loss_terms

LEGS = [
    ({"data": 1}, 1, 1),
    ({"data": 2}, 1, 2),
    ({"data": 4}, 1, 4),
    ({"data": 8}, 1, 8),
    ({"data": 4}, 2, 2),
    ({"replica_dcn": 2, "data": 2}, 1, 4),
    ({"data": 2, "model": 2}, 2, 2),
    ({"data": 1}, 1, 1),
]
"""Mesh axes, processes, and devices of each process; the run takes one step on each."""

pytestmark = pytest.mark.timeout(600)


def together(run: Run, processes: int, devices: int, **job: Any) -> str:
    """Runs processes of so many devices each, under `jax.distributed` if there are several; what the first said."""
    # A device in a collective blocks a thread of XLA's pool, and the pool is to have some to spare.
    environments = [{"NPROC": str(4 * devices)} for _ in range(processes)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        for index, environment in enumerate(environments):
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
            environment |= {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
    started = [
        run.start(environment=environment, output=run.folder.with_name(f"log-{index}"), devices=devices, **job)
        for index, environment in enumerate(environments)
    ]
    first, *_ = [process.wait().expect(0) for process in started]
    return first


def test_a_run_is_handed_from_mesh_to_mesh(server: ForkServer, tmp_path: Path) -> None:
    eight = {"trainer.train_batch_size": 8, "trainer.steps_per_checkpoint": None}
    alone, run = (server.run(tmp_path / name, eight) for name in ("alone", "handed"))
    alone.fit().expect(0)
    for step, (axes, processes, devices) in enumerate(LEGS):
        mesh = {"replica_dcn": 1, "data": 1, "expert": 1, "model": 1} | axes
        run.edit({f"trainer.mesh.{axis}": size for axis, size in mesh.items()})
        said = together(run, processes, devices, stop_after=step + 1)
        # What is loaded is digested on the new mesh, and has to be what was saved from the old one.
        assert step == 0 or f"resuming from {run.step(step)}" in said
        assert run.metadata(step + 1).mesh == mesh
    assert quarantined(run.checkpoints) == []
    expect_the_same(run, alone)


def test_the_command_line_trains_in_two_processes(server: ForkServer, tmp_path: Path) -> None:
    steps = {"trainer.num_train_steps": 2, "trainer.steps_per_checkpoint": None}
    steps |= {"eval.sample_prompts": ["grug", "say"], "eval.sample_tokens": 4}
    alone, run = (server.run(tmp_path / name, steps) for name in ("alone", "together"))
    alone.fit().expect(0)
    said = together(run, 2, 1, command=("train", "--config_path", str(run.config)))
    assert "process 0 of 2, 2 devices" in said and "finished after 2 steps" in said
    expect_the_same(run, alone)
    assert (run.folder / "samples.md").read_text() == (alone.folder / "samples.md").read_text()


def expect_the_same(run: Run, other: Run) -> None:
    rows, wanted = (read_metrics(each.folder / METRICS_FILE) for each in (run, other))
    assert len(rows) == len(wanted) >= 2
    for row, expected in zip(rows, wanted, strict=True):
        assert row["data/batch_digest"] == expected["data/batch_digest"]
        assert_close(row["train/loss"], expected["train/loss"], terms=len(rows) * loss_terms(SMALL_MODEL, 8 * 32, 32))


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled(server: ForkServer, tmp_path: Path) -> None:
    run = server.run(tmp_path / "run", {"trainer.mesh.data": 3})
    run.fit(devices=4).expect(
        2, "a mesh of replica_dcn=1, data=3, expert=1, model=1 does not fit 4 device(s)", "set one of them"
    )
    run.edit({"trainer.mesh.data": -1}).fit(devices=8).expect(2, "train_batch_size=4 does not divide over 8", "use 8")


def test_half_a_cluster_is_refused(server: ForkServer, tmp_path: Path) -> None:
    run = server.run(tmp_path / "run")
    run.fit(environment={"JAX_NUM_PROCESSES": "2"}).expect(2, "set JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID too")
    said = run.start(command=("train", "--config_path", str(run.config)), environment={"JAX_PROCESS_ID": "0"}).wait()
    said.expect(2, "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES too, or none of them")
