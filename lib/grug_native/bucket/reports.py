"""The reports of lm-eval's tasks of a run in a bucket: objects of their own, added and never replaced."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from grug_native.bucket.errors import StoreError
from grug_native.bucket.place import store_of
from grug_native.bucket.store import Store, patiently
from grug_native.evaluation.harness_reports import UnwrittenReportError

logger = logging.getLogger(__name__)


@dataclass
class Reports:
    """Reports that are being added to."""

    folder: Path
    """Those that are there, on this machine; new ones go there too."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """The numbers of the new one."""


@contextmanager
def reports_folder(url: str, name: str, *, patience: float) -> Generator[Reports]:
    """Fetches the reports of a run, and puts what is new among them afterwards.

    Args:
        url: of the run.
        name: of the folder.
        patience: seconds for which it is tried again while the store is in trouble.

    Raises:
        UnwrittenReportError: it cannot be put; the error has the report and its numbers.
    """
    with TemporaryDirectory(prefix="grug-") as temporary:
        reports = Reports(Path(temporary) / name)
        if jax.process_index() != 0:
            yield reports
            return
        store = store_of(url)
        reports.folder.mkdir()
        for key in patiently(name, lambda: store.list(f"{name}/"), patience=patience):
            found = patiently(key, lambda key=key: store.get(key), patience=patience)
            if found is not None:
                (reports.folder / key.removeprefix(f"{name}/")).write_bytes(found.data)
        before = {path.name for path in reports.folder.iterdir()}
        yield reports
        for path in sorted(reports.folder.iterdir()):
            if path.name not in before:
                _put(store, f"{name}/{path.name}", path.read_bytes(), reports.metrics, patience)


def _put(store: Store, key: str, report: bytes, metrics: Mapping[str, float], patience: float) -> None:
    try:
        if patiently(key, lambda: store.put(key, report, over=None), patience=patience) is None:
            raise FileExistsError(f"{store.url}/{key} was written by another process meanwhile: run the tasks again")
    except (StoreError, FileExistsError) as error:
        unwritten = UnwrittenReportError(f"the report cannot be written: {error}")
        unwritten.metrics, unwritten.report = metrics, report.decode()
        raise unwritten from error
    logger.info("report: %s/%s", store.url, key)
