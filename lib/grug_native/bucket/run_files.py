"""The small files of a run in a bucket, such as its config, between a folder of this machine and the bucket."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from grug_native.bucket.reading import small_file
from grug_native.bucket.record import DamagedRecordError
from grug_native.bucket.run_head import SmallFile, digest
from grug_native.bucket.run_writer import RunWriter
from grug_native.tracking.jsonl import METRICS_FILE
from grug_native.tracking.profile import PROFILE_FOLDER
from grug_native.tracking.run_log import LOG_FILE

logger = logging.getLogger(__name__)


def changed_files(writer: RunWriter, folder: Path, names: Sequence[str]) -> list[SmallFile]:
    """Writes new versions of the files of these names that have changed since `run.json` named them, for a commit.

    Raises:
        StoreError: The store is in trouble.
    """
    known = {file.path: file.sha256 for file in writer.head.files}
    found = {name: path.read_bytes() for name in names if (path := folder / name).is_file()}
    return [writer.put_file(name, data) for name, data in found.items() if digest(data) != known.get(name)]


def put_profiles(writer: RunWriter, folder: Path) -> None:
    """Puts the profiles that this process has made beside the run, of which they are no part.

    Raises:
        StoreError: The store is in trouble.
    """
    for path in sorted((folder / PROFILE_FOLDER).rglob("*")):
        if path.is_file():
            writer.store.overwrite(path.relative_to(folder).as_posix(), path.read_bytes())


def fetch_files(writer: RunWriter, folder: Path, names: Sequence[str]) -> None:
    """Brings the run's small files here, and removes what an earlier run of this process has left.

    One that is damaged is left out, which is logged: no result hangs on it.

    Raises:
        StoreError: The store is in trouble.
    """
    every = {LOG_FILE, *names, *(file.path for file in writer.head.files)}
    for name in {METRICS_FILE, *every}:
        (folder / name).unlink(missing_ok=True)
    if (profiles := folder / PROFILE_FOLDER).is_dir():
        shutil.rmtree(profiles)
    for name in every:
        try:
            data = small_file(writer.store, writer.head, name)
        except DamagedRecordError as error:
            logger.error("%s; the run goes on without it", error)
            continue
        if data is not None:
            (folder / name).write_bytes(data)
