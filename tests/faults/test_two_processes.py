"""F19 to F22: two processes under jax.distributed on loopback, and a fault in one of them."""

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.faults.runs import ForkServer, Run, Running

pytestmark = [pytest.mark.slow_faults, pytest.mark.timeout(600)]

STEPS = {"trainer.num_train_steps": 40, "trainer.steps_per_checkpoint": 10}


def start_both(run: Run, fault: str | None = None) -> tuple[Running, Running]:
    """Starts processes 0 and 1 of a run; the first one is the coordinator."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    zero, one = (
        run.start(
            fault,
            environment=shared | {"JAX_PROCESS_ID": str(index)},
            output=run.folder.with_name(f"{run.folder.name}-{index}.log"),
        )
        for index in range(2)
    )
    return zero, one


def fit_both(run: Run) -> None:
    for process in start_both(run):
        process.wait(300).expect(0)


@pytest.fixture(scope="module")
def both(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of two processes."""
    run = server.run(tmp_path_factory.mktemp("both") / "run", STEPS)
    fit_both(run)
    return run


@pytest.fixture
def pair(server: ForkServer, tmp_path: Path) -> Run:
    """A run as `both`, not started."""
    return server.run(tmp_path / "run", STEPS)


@pytest.mark.parametrize("victim", [0, 1])
def test_f19_one_of_two_is_killed(victim: int, pair: Run, both: Run) -> None:
    processes = start_both(pair, f"kill@step:15:{victim}")
    processes[victim].wait(300).expect(-signal.SIGKILL)
    started = time.monotonic()
    survivor = processes[1 - victim].wait(100)
    print(f"the survivor ended with {survivor.code} after {time.monotonic() - started:.1f} s")
    assert survivor.code != 0 and time.monotonic() - started < 30
    assert pair.steps == [10]
    fit_both(pair)
    pair.expect_equal(both)


@pytest.mark.parametrize("told", [0, 1])
def test_f20_one_of_two_is_told_to_stop(told: int, pair: Run, both: Run) -> None:
    for process in start_both(pair, f"term@step:15:{told}"):
        process.wait(300).expect(143)
    assert 15 < pair.steps[0] < 40
    fit_both(pair)
    assert pair.record() == both.record() and pair.digests() == both.digests()


def test_f21_one_of_two_hangs(pair: Run, both: Run) -> None:
    zero, one = start_both(pair, "stop@step:15:1")
    started = time.monotonic()
    try:
        survivor = zero.wait(300)
    finally:
        one.send(signal.SIGKILL)
    print(f"the survivor ended with {survivor.code} after {time.monotonic() - started:.1f} s")
    assert survivor.code != 0
    one.wait(30)
    fit_both(pair)
    pair.expect_equal(both)


def test_f22_one_of_two_fails_in_a_save(pair: Run, both: Run) -> None:
    for process in start_both(pair, "raise@mid_write:20:1"):
        assert process.wait(300).code != 0
    assert pair.steps[0] in (10, 20) and pair.digests()
    fit_both(pair)
    pair.expect_equal(both)
