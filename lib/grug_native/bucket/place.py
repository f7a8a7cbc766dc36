"""Where a run is, whatever `output_path` says: a folder of this machine, or one in a bucket.

A run in a bucket has a folder on this machine too, in which its process keeps the small files while it trains. Nothing
here opens TensorStore for a path.
"""

import atexit
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grug_native.checkpoint import run_place
from grug_native.checkpoint.source import Checkpoints, FolderCheckpoints
from grug_native.host.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, RunLockedError, is_bucket, local_path

if TYPE_CHECKING:
    from grug_native.bucket.store import Store

logger = logging.getLogger(__name__)


def checkpoints_of(output_path: str) -> Checkpoints:
    """Returns the checkpoints of a run, to be read.

    Raises:
        ValueError: `output_path` is neither a path nor a URL of a folder in a bucket.
    """
    if not is_bucket(output_path):
        return FolderCheckpoints(local_path(output_path) / CHECKPOINTS_FOLDER)
    from grug_native.bucket.reading import BucketCheckpoints

    return BucketCheckpoints(store_of(output_path))


def files_of(output_path: str) -> Path:
    """Returns the folder on this machine in which this process keeps the run's files: of a path, the run's own."""
    return _scratch(output_path.rstrip("/")) if is_bucket(output_path) else local_path(output_path)


def store_of(url: str, *, field: str = "output_path") -> "Store":
    """Returns the objects under a URL."""
    from grug_native.bucket.store import Store

    return Store(url, field=field)


def check_place(output_path: str) -> None:
    """Proves that a bucket is there, may be written to and keeps conditions; of a path nothing is asked.

    Raises:
        StoreError: It is not so; says what to do.
    """
    if is_bucket(output_path):
        from grug_native.bucket.store import check_store

        check_store(store_of(output_path))


def read_file(output_path: str, name: str) -> bytes | None:
    """Returns a small file of a run, of one that goes on too; None if it has none of that name.

    Raises:
        DamagedRecordError: It is not what was written.
        StoreError: The bucket is in trouble.
    """
    if not is_bucket(output_path):
        path = local_path(output_path) / name
        return path.read_bytes() if path.is_file() else None
    from grug_native.bucket.reading import small_file
    from grug_native.bucket.record import live_record
    from grug_native.bucket.run_writer import read_head
    from grug_native.tracking.jsonl import METRICS_FILE

    store = store_of(output_path)
    head = read_head(store)
    if name == METRICS_FILE and head is not None:
        return live_record(store) or None
    return small_file(store, head, name)


def write_file(output_path: str, name: str, data: bytes) -> None:
    """Writes a small file beside a run's own, whole or not at all; no right to the run is needed.

    Raises:
        StoreError: The bucket is in trouble.
        OSError: The disk is.
    """
    if is_bucket(output_path):
        store_of(output_path).overwrite(name, data)
        return
    path = local_path(output_path) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def fetched(output_path: str, names: Sequence[str]) -> Path:
    """Returns a folder that holds files of a run, as far as it has them: its own, or a copy under its name."""
    if not is_bucket(output_path):
        return local_path(output_path)
    folder = _fresh(output_path.rstrip("/"))
    for name in names:
        data = read_file(output_path, name)
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Reads the sections of a config from YAML, as plain data; of a run, by its folder, in a bucket too.

    Raises:
        ValueError: if the file is no YAML, or holds no sections; or the folder is no run's.
        FileNotFoundError: if there is no such file.
    """
    if not is_bucket(path):
        return run_place.read_config_file(Path(path))
    url = str(path).rstrip("/")
    folder, _, name = url.rpartition("/") if url.endswith((".yaml", ".yml")) else (url, "", CONFIG_FILE)
    found = read_file(folder, name)
    if found is None:
        raise FileNotFoundError(f"{folder} has no {name}: give the URL of a run (a missing bucket looks empty, too)")
    raw = run_place.parsed_yaml(found.decode(), f"{folder}/{name}")
    return run_place.at_its_url(raw, folder) if name == CONFIG_FILE else raw


def recorded_config(output_path: str) -> dict[str, Any] | None:
    """Returns the sections of the `config.yaml` of a run, as they are written; None if none has been started there."""
    if not is_bucket(output_path):
        folder = Path(output_path)
        return run_place.read_yaml(folder / CONFIG_FILE) if run_place.is_run(folder) else None
    found = read_file(output_path, CONFIG_FILE)
    return None if found is None else run_place.parsed_yaml(found.decode(), f"{output_path}/{CONFIG_FILE}")


def kept_in(output_path: str) -> Callable[[str, Path, BaseException | None], None] | None:
    """Returns what puts a file beside a run in a bucket when its process ends, as far as that is possible then."""
    if not is_bucket(output_path):
        return None

    def put(name: str, file: Path, error: BaseException | None) -> None:
        from grug_native.bucket.errors import StoreError

        if isinstance(error, RunLockedError):
            return  # It is another process's by now.
        try:
            write_file(output_path, name, file.read_bytes())
        except StoreError as trouble:
            logger.warning("%s/%s is not kept: %s", output_path, name, trouble)

    return put


@cache
def _scratch(url: str) -> Path:
    return _fresh(url)


def _fresh(url: str) -> Path:
    root = Path(tempfile.mkdtemp(prefix="grug-"))
    atexit.register(_remove, root)
    folder = root / url.rsplit("/", 1)[-1]
    folder.mkdir()
    return folder


def _remove(root: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(root)
