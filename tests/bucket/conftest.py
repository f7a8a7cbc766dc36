"""The two stores, started once a session, each behind its proxy."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bucket.proxy import FaultProxy
from tests.bucket.servers import Bucket, start_gcs, start_s3
from tests.bucket.toy import Server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    process, port = start_gcs(tmp_path_factory.mktemp("gcs") / "log")
    proxy = FaultProxy(port, gcs_conditions=True)
    yield Bucket("gs", port, proxy)
    proxy.close()
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    process, port = start_s3(tmp_path_factory.mktemp("s3"))
    proxy = FaultProxy(port)
    yield Bucket("s3", port, proxy)
    proxy.close()
    process.kill()  # it would take ten seconds to heed SIGTERM
    process.wait()


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("toys"))


@pytest.fixture(params=["gcs", "s3"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A store, which this process finds by its environment too."""
    found: Bucket = request.getfixturevalue(request.param)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    yield found
    found.proxy.set_rules()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder on the disk, as a store."""
    return f"file://{tmp_path}/run"
