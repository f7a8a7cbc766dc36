"""The same run on one device, on many, and on several processes: same batches, same losses, state handed over whole."""

import socket
from pathlib import Path

import pytest

from grug_native.run_folder import quarantined
from grug_native.tracker import METRICS_FILE, read_metrics
from tests.faults.runs import ForkServer, Run

LEGS = [
    ({"data": 1}, 1, 1),
    ({"data": 2}, 1, 2),
    ({"data": 4}, 1, 4),
    ({"data": 8}, 1, 8),
    ({"data": 4}, 2, 2),
    ({"data": 2, "model": 2}, 1, 4),
    ({"replica_dcn": 2, "data": 2}, 1, 4),
    ({"data": 2, "model": 2}, 2, 2),
]
"""Mesh axes, processes, and devices of each process; the run takes one step on each."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    return ForkServer(tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def alone(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All steps on one device."""
    run = server.run(tmp_path_factory.mktemp("alone") / "run", {"trainer.train_batch_size": 8})
    run.fit().expect(0)
    return run


def take_a_leg(run: Run, mesh: dict[str, int], processes: int, devices: int, stop_after: int) -> str:
    """Goes on from where the run is; returns what the first process said."""
    sizes = {"replica_dcn": 1, "data": 1, "model": 1} | mesh
    run.edit({f"trainer.mesh.{axis}": size for axis, size in sizes.items()})
    environment = dict[str, str]()
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
        }
    started = [
        run.start(
            stop_after=stop_after,
            devices=devices,
            environment=environment | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}),
            output=run.folder.with_name(f"log-{index}"),
        )
        for index in range(processes)
    ]
    first, *_ = [process.wait().expect(0) for process in started]
    return first


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", [0, 4], ids=["from one device", "from two processes"])
def test_a_run_is_handed_from_mesh_to_mesh(first: int, server: ForkServer, alone: Run, tmp_path: Path) -> None:
    run = server.run(tmp_path / "run", {"trainer.train_batch_size": 8})
    for step, (mesh, processes, devices) in enumerate(LEGS[first:] + LEGS[:first]):
        said = take_a_leg(run, mesh, processes, devices, step + 1)
        # What is loaded is digested on the new mesh, and has to be what was saved from the old one.
        assert step == 0 or f"resuming from {run.step(step)}" in said
        assert run.metadata(step + 1).mesh == {"replica_dcn": 1, "data": 1, "model": 1} | mesh
    assert quarantined(run.checkpoints) == []
    rows, wanted = (read_metrics(each.folder / METRICS_FILE) for each in (run, alone))
    assert len(rows) == len(wanted) == len(LEGS)
    for row, other in zip(rows, wanted, strict=True):
        assert row["data/batch_digest"] == other["data/batch_digest"]
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled(server: ForkServer, tmp_path: Path) -> None:
    run = server.run(tmp_path / "run", {"trainer.mesh.data": 3})
    run.fit(devices=4).expect(2, "a mesh of replica_dcn=1, data=3, model=1 does not fit 4 device(s)", "set one of them")
    run.edit({"trainer.mesh.data": -1}).fit(devices=8).expect(2, "train_batch_size=4 does not divide over 8", "use 8")


def test_half_a_cluster_is_refused(server: ForkServer, tmp_path: Path) -> None:
    run = server.run(tmp_path / "run")
    run.fit(environment={"JAX_NUM_PROCESSES": "2"}).expect(2, "set JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID too")
