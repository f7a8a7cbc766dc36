"""Whole objects by key in a bucket, each write conditional. Nothing else of an object store is used.

The store is TensorStore's key-value store, for `gs://` and `s3://`; `file://` is for tests. (With `memory://`
TensorStore 0.1.84 can lock itself up: it lets go of a written array under its lock, for which it waits for Python's.)
"""

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, final
from urllib.parse import urlsplit

import tensorstore as ts

from grug_native.bucket.errors import (
    CredentialsError,
    NoConditionsError,
    StoreError,
    UnreachableError,
    explained,
    no_bucket,
    words_of,
)

logger = logging.getLogger(__name__)

_SCHEMES = ("gs", "s3", "file")
_DEADLINE = 120.0
"""Seconds that one small object may take; what takes longer hangs."""
_PROBES = 2
_RACERS = 3
_LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Retries:
    """How often TensorStore itself repeats a request that failed by 429, 5xx or a cut connection."""

    first_pause: float = 0.5
    """Seconds before the first repetition; each later pause is up to twice as long."""
    longest_pause: float = 8.0
    """Seconds between two at most."""
    attempts: int = 6
    """How many."""


@dataclass(frozen=True)
class Found:
    """An object."""

    data: bytes
    """All of it."""
    generation: bytes
    """Which version of it; a write can ask for it."""


@final
class Store:
    """The objects under one URL."""

    def __init__(self, url: str, *, field: str = "output_path", retries: Retries | None = None):
        """Opens the store; asks it nothing.

        Args:
            url: `gs://BUCKET/FOLDER` or `s3://BUCKET/FOLDER`.
            field: The setting that holds the URL, for messages.
            retries: Of requests that fail.

        Raises:
            ValueError: `url` is none of these.
        """
        self.url = url.rstrip("/")
        self._spec = _kvstore_spec(self.url, field)
        self._retries = retries or Retries()
        how = {
            "initial_delay": f"{self._retries.first_pause}s",
            "max_delay": f"{self._retries.longest_pause}s",
            "max_retries": self._retries.attempts,
        }
        settings = {"gcs_request_retries": how, "s3_request_retries": how}
        self._context = ts.Context(settings)
        try:
            self._kv = ts.KvStore.open(self._spec, context=self._context).result()
        except ValueError as error:
            raise ValueError(f"{field}={url!r} is refused: {words_of(error)}") from error

    def reopened(self) -> "Store":
        """Returns the same store by a client that has nothing cached."""
        return Store(self.url, retries=self._retries)

    def under(self, folder: str) -> "Store":
        """Returns the store of a folder in this one."""
        return Store(f"{self.url}/{folder}", retries=self._retries)

    def get(self, key: str) -> Found | None:
        """Returns an object; None if there is none, which a bucket that is not there says as well.

        Raises:
            StoreError: It cannot be told.
        """
        found = self._do("read", key, self._kv.read(key))
        return Found(found.value, found.stamp.generation) if found.state == "value" else None

    def put(self, key: str, data: bytes, *, over: bytes | None) -> bytes | None:
        """Writes an object in place of the version `over`; None: only if there is none.

        Requests are repeated, so one whose answer was lost is refused by its own first success: then the object is
        looked at. Whoever writes must not write the same bytes over different versions.

        Returns:
            Its new version; None if another one was there.

        Raises:
            StoreError: It was not written, or that cannot be told.
        """
        try:
            future = self._kv.write(key, data, if_equal=_absent() if over is None else over)
            generation = self._do("write", key, future).generation
        except UnreachableError as error:
            found = self._quietly(key)
            if found is None or found.data != data:
                raise error
            return found.generation
        if generation:
            return generation
        found = self.get(key)
        if found is None and over is None:
            raise no_bucket(self.url, f"{key} is refused, and is not there")
        return found.generation if found is not None and found.data == data else None

    def winners(self, key: str, over: bytes | None) -> int:
        """Returns how many of some writes over one version succeed that are sent at once: at most one should."""
        condition = _absent() if over is None else over
        started = [self._kv.write(key, f"racer {n}".encode(), if_equal=condition) for n in range(_RACERS)]
        return sum(bool(self._do("write", key, future).generation) for future in started)

    def overwrite(self, key: str, data: bytes) -> None:
        """Writes an object whatever is there."""
        self._do("write", key, self._kv.write(key, data))

    def list(self, prefix: str) -> list[str]:
        """Returns the keys that begin with `prefix`, sorted."""
        return sorted(key.decode() for key in self._do("list", prefix, self._kv.list(_range(prefix))))

    def delete(self, key: str) -> None:
        """Deletes an object, if it is there."""
        self._do("delete", key, self._kv.write(key, None))

    def delete_under(self, folder: str) -> None:
        """Deletes all objects whose keys begin with `folder`, which ends in a slash."""
        assert folder.endswith("/"), folder
        self._do("delete", folder, self._kv.delete_range(_range(folder)))

    def array(self, key: str, metadata: dict[str, Any], *, assume: bool = False, write: bool = False) -> ts.TensorStore:
        """Opens a zarr3 array, whose chunks are objects under `key/`.

        Args:
            key: Where it is.
            metadata: zarr's; what is stored has to agree.
            assume: Neither read nor write the stored metadata.
            write: Make it if it is not there.
        """
        assert isinstance(self._spec["path"], str)
        spec: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": self._spec | {"path": f"{self._spec['path']}{key}/"},
            "metadata": metadata,
            # So that a chunk of zeros is written, and one that is gone is not read as zeros.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        made: dict[str, Any] = {"assume_metadata": True} if assume else {"create": True} if write else {}
        return ts.open(spec, open=True, read=True, write=write, context=self._context, **made).result()

    def _do(self, what: Literal["read", "write", "list", "delete"], key: str, future: Any) -> Any:
        try:
            return future.result(timeout=_DEADLINE)
        except Exception as error:  # TensorStore raises ValueError and other bare kinds for whatever went wrong
            raise explained(self.url, what, key, error) from error

    def _quietly(self, key: str) -> Found | None:
        try:
            return self.get(key)
        except StoreError:
            return None


def check_store(store: Store) -> None:
    """Proves by writing that the bucket is there, may be written to, and keeps the conditions of writes.

    Raises:
        NoSuchBucketError: It is not there.
        CredentialsError: It may not be written to.
        UnreachableError: It does not answer.
        NoConditionsError: It ignores conditions.
    """
    for _ in range(_PROBES):
        key = f".probe-{secrets.token_hex(8)}"
        held = store.put(f"{key}-2", b"0", over=None)
        for target, over, which in ((f"{key}-1", None, "if-none-match"), (f"{key}-2", held, "if-match")):
            # At once, as TensorStore looks before it writes: one after the other would be refused by that look alone.
            if store.winners(target, over) > 1:
                store.delete(target)
                raise NoConditionsError(
                    f"{store.url}: this store ignores the condition {which} of a write, so that two processes could"
                    " write one run: use a store that keeps it, as GCS and S3 do, or a folder of a POSIX file system"
                )
            store.delete(target)


def patiently[Result](what: str, action: Callable[[], Result], *, patience: float) -> Result:
    """Does what may fail by trouble of the store, again and again for `patience` seconds.

    Raises:
        StoreError: It failed to the last.
    """
    started, pause = time.monotonic(), 0.5
    while True:
        try:
            return action()
        except (UnreachableError, CredentialsError) as error:
            left = started + patience - time.monotonic()
            if left <= 0:
                raise
            logger.warning("%s is tried again for %.0f s: %s", what, left, error)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)


@cache
def _absent() -> bytes:
    """The version of an object that is not there; an empty one would mean any version."""
    return ts.KvStore.open({"driver": "memory"}).result().read("none").result().stamp.generation


def _kvstore_spec(url: str, field: str) -> dict[str, Any]:
    parts = urlsplit(url)
    inside = parts.path.strip("/")
    odd = "\0" in url or "//" in parts.path or {".", ".."} & set(inside.split("/")) or parts.query or parts.fragment
    if parts.scheme not in _SCHEMES or odd or not inside or (parts.scheme in ("gs", "s3") and not parts.netloc):
        raise ValueError(
            f"{field}={url!r} must be a folder in a bucket, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, without '..',"
            " '//', '?' and '#'"
        )
    match parts.scheme:
        case "file":
            return {"driver": "file", "path": f"/{inside}/"}
        case "gs":
            if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
                address = emulator if "://" in emulator else f"http://{emulator}"
                os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
            return {"driver": "gcs", "bucket": parts.netloc, "path": f"{inside}/"}
        case _:
            return {"driver": "s3", "bucket": parts.netloc, "path": f"{inside}/"} | _s3_settings()


def _s3_settings() -> dict[str, Any]:
    settings: dict[str, Any] = {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        settings |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        settings["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        settings["aws_credentials"] = {"type": "environment"}
    return settings


def _range(prefix: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else ts.KvStore.KeyRange()
