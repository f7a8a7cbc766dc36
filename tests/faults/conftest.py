"""The uninterrupted runs that others are compared with; made once a session."""

from pathlib import Path

import pytest

from tests.faults.runs import ForkServer, Run


@pytest.fixture(scope="session")
def whole(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run, permanent checkpoints every two of its eight steps. Not to be written to."""
    run = server.run(tmp_path_factory.mktemp("whole") / "run")
    run.fit().expect(0)
    return run


@pytest.fixture(scope="session")
def whole_eval(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As `whole`, with a moving average, and an evaluation of both every two steps."""
    run = server.run(tmp_path_factory.mktemp("whole-eval") / "run", base="eval")
    run.fit().expect(0)
    return run


@pytest.fixture
def run(server: ForkServer, tmp_path: Path) -> Run:
    """A run as `whole`, not started."""
    return server.run(tmp_path / "run")


@pytest.fixture
def half(server: ForkServer, halfway: Run, tmp_path: Path) -> Run:
    """A run as `whole` that was stopped after five steps: checkpoints of 2, 4 and 5."""
    return server.copy(halfway, tmp_path / "run")


@pytest.fixture(scope="session")
def halfway(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What `half` is a copy of."""
    run = server.run(tmp_path_factory.mktemp("half") / "run")
    run.fit(stop_after=5).expect(0)
    return run
