"""The right to write to a run's folder in a bucket, and every change of it: swaps of `run.json`.

Whoever owns the run shows signs of life by swaps. Whoever wants it waits for them by his own clock, and takes it if
none comes, by a swap too. So a process that was taken for dead and wakes up fails at its next swap, and can commit
nothing: that needs no clock that two machines share. What it wrote meanwhile has names that nobody else uses, and is
swept.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Literal, final

from grug_native.bucket.errors import StoreError
from grug_native.bucket.owner import Owner, is_gone, this_process
from grug_native.bucket.run_head import (
    HEAD,
    CheckpointEntry,
    Folder,
    HeadError,
    RunHead,
    Segment,
    SmallFile,
    attempt_of,
    digest,
    epoch_of,
    new_name,
)
from grug_native.bucket.store import Found, Store, patiently
from grug_native.host.run_folder import RunLockedError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""A run whose owner gives no sign of life for so long may be taken."""

_BEATS = 4
"""Signs of life in a lease."""
_LOOKS = 6
"""How often one who waits looks in a lease."""


@final
class FencedError(RunLockedError):
    """Another process has taken this one's run."""


def read_head(store: Store) -> RunHead | None:
    """Returns the head of the run in `store`; None if there is none, or no such bucket.

    Raises:
        HeadError: It is damaged.
        StoreError: It cannot be read.
    """
    found = store.get(HEAD)
    return None if found is None else _decoded(store, found)


@final
class RunWriter:
    """The one owner of a run's folder, as long as its swaps succeed. Its methods may be called from any thread."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        temporary: Store | None = None,
        lease: float = LEASE_SECONDS,
        patience: float = 0.0,
    ):
        """Takes the run, begins to show signs of life, and removes what earlier owners left half-done.

        Args:
            store: The run's folder; proven by `check_store`.
            run_id: The run's name.
            temporary: Where temporary checkpoints go; None for the run's own folder.
            lease: Seconds without a sign of life after which another process may take the run.
            patience: Seconds for which a change is tried again while the store is in trouble.

        Raises:
            RunLockedError: Another process owns the run.
            HeadError: `run.json` is damaged, or missing while other objects of a run are there.
            StoreError: The store is in trouble.
        """
        self.store = store
        self.temporary = store if temporary is None else temporary
        self.patience = patience
        self._mutex = threading.RLock()
        self._stop = threading.Event()
        self._fenced: FencedError | None = None
        self._given_up: set[tuple[Store, str]] = set()
        self._me = this_process(lease)
        self._head, self._generation = self._claim(run_id)
        self._beats = threading.Thread(target=self._beat, args=(lease / _BEATS,), daemon=True, name="grug-lease")
        self._beats.start()
        try:
            self.sweep()
        except BaseException:
            with suppress(StoreError, FencedError):
                self.close()
            raise

    @property
    def head(self) -> RunHead:
        """The run as this process last wrote it."""
        return self._head

    @property
    def owner(self) -> Owner:
        """This process."""
        return self._me

    def check(self) -> None:
        """Raises FencedError if a sign of life has failed for another owner; asks the store nothing."""
        if self._fenced is not None:
            raise self._fenced

    def new_name(self, folder: Folder, name: int | str) -> str:
        """Returns a name for an attempt of this process."""
        return new_name(folder, name, self._head.epoch)

    def give_up(self, store: Store, name: str) -> None:
        """Says that nobody will commit `name`; it is deleted after a swap that shows that nobody has."""
        with self._mutex:
            self._given_up.add((store, name))

    def swap(self, change: Callable[[RunHead], RunHead]) -> RunHead:
        """Changes the run in one step; `change` must stand being applied to its own result.

        Returns:
            The run as it now is.

        Raises:
            FencedError: Another process has taken the run; then and from then on.
            StoreError: The store is in trouble. The change may have been made, or be made later by a request under
                way; the next swap finds out.
        """
        return patiently(f"{self.store.url}/{HEAD}", lambda: self._swap(change), patience=self.patience)

    def commit(
        self, entry: CheckpointEntry, segment: Segment | None = None, written: Sequence[SmallFile] = ()
    ) -> RunHead:
        """Makes a checkpoint visible, and what the run said until then, in one swap; then drops what it replaces."""
        before = self._head
        after = self.swap(lambda head: head.committed(entry, segment, written))
        self._drop([c for c in before.checkpoints if c not in after.checkpoints])
        self._tidy(before, after)
        return after

    def record(self, segment: Segment | None, written: Sequence[SmallFile] = ()) -> RunHead:
        """Adds to what the run says, without a checkpoint."""
        before = self._head
        after = self.swap(lambda head: head.recorded(segment, written))
        self._tidy(before, after)
        return after

    def retire(self, entries: Sequence[CheckpointEntry]) -> None:
        """Drops checkpoints: first nobody can find them, then they are deleted."""
        if entries:
            self.swap(lambda head: head.without(entries))
            self._drop(entries)

    def set_aside(self, entries: Sequence[CheckpointEntry], label: Literal["corrupt", "abandoned"], why: str) -> None:
        """Takes checkpoints out of use without touching a byte of them."""
        if entries:
            self.swap(lambda head: head.aside(entries, label, why))

    def rollback(self, step: int) -> list[CheckpointEntry]:
        """Makes `step` the newest checkpoint, and the record's end; returns the newer ones, which are set aside."""
        before = self._head
        newer = [c for c in before.checkpoints if c.step > step]
        why = f"stepped back to {step}"
        self._tidy(before, self.swap(lambda head: head.aside(newer, "abandoned", why).cut(step)))
        return newer

    def cut(self, step: int) -> None:
        """Cuts the record back to the steps before `step`, from whose checkpoint the run goes on."""
        before = self._head
        if before.cut(step).log != before.log:
            self._tidy(before, self.swap(lambda head: head.cut(step)))

    def put_file(self, path: str, data: bytes) -> SmallFile:
        """Writes a new version of a file of the run, for `commit` or `record` to name."""
        name = self.new_name("files/", path)
        self.put_once(name, data)
        return SmallFile(path=path, name=name, sha256=digest(data))

    def put_once(self, key: str, data: bytes) -> None:
        """Writes an object that nobody else can have written."""
        if patiently(key, lambda: self.store.put(key, data, over=None), patience=self.patience) is None:
            raise FencedError(f"{self.store.url}/{key} is there, written by another process")

    def sweep(self) -> list[str]:
        """Removes what past epochs wrote and `run.json` does not name: nobody can commit it any more.

        Returns:
            The names.
        """
        known = {*self._head.names()}
        removed: list[str] = []
        for store, folders in ((self.store, ("checkpoints/", "log/", "files/")), (self.temporary, ("checkpoints/",))):
            for name in sorted({attempt_of(key) for folder in folders for key in store.list(folder)}):
                epoch = epoch_of(name)
                if epoch is not None and epoch < self._head.epoch and name not in known:
                    _delete(store, name)
                    removed.append(name)
                    logger.warning("removed %s/%s, which a process that was stopped did not commit", store.url, name)
        for key in self.store.list(".probe-"):
            self.store.delete(key)
        return removed

    def close(self, segment: Segment | None = None, written: Sequence[SmallFile] = ()) -> None:
        """Commits the end of what the run says, and gives the run up; doing so twice is harmless."""
        self._stop.set()
        self._beats.join()
        if self._head.owner is not None:
            before = self._head
            self._tidy(before, self.swap(lambda head: head.recorded(segment, written).released()))

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (StoreError, RunLockedError) as late:
            if error is None:
                raise
            error.add_note(f"giving up the run failed as well: {late!r}")

    def _claim(self, run_id: str) -> tuple[RunHead, bytes]:
        found = self.store.get(HEAD)
        if found is None:
            self._refuse_remains()
            head = RunHead(run_id=run_id)
        else:
            found = self._unowned(found)
            head = _decoded(self.store, found)
        # The name may change with the one who goes on; the checkpoints say which run they are of.
        head = replace(head.claimed(self._me), run_id=run_id, serial=head.serial + 1)
        generation = self.store.put(HEAD, head.encode(), over=None if found is None else found.generation)
        if generation is None:
            raise RunLockedError(f"{self.store.url} was taken by another process at this moment; it runs there")
        return head, generation

    def _refuse_remains(self) -> None:
        keys = [key for folder in ("checkpoints/", "log/", "files/") for key in self.store.list(folder)]
        if keys:
            raise HeadError(
                f"{self.store.url}/{HEAD} is missing, and {keys[0]} and {len(keys) - 1} more objects of a run are"
                " there: refusing to start from scratch. Put it back (an earlier version, if the bucket has any),"
                " or give another output_path"
            )

    def _unowned(self, found: Found) -> Found:
        """The head, once it is sure that nobody lives who owns it."""
        owner = _decoded(self.store, found).owner
        if owner is None or is_gone(owner):
            return found
        logger.info("%s is owned by %s: waiting %.0f s for a sign of life", self.store.url, owner, owner.lease)
        until = time.monotonic() + owner.lease
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(owner.lease / _LOOKS, left))
            now = self.store.get(HEAD)
            if now is None:
                raise HeadError(f"{self.store.url}/{HEAD} was removed at this moment; start again")
            if now.generation != found.generation:
                if _decoded(self.store, now).owner is None:
                    return now
                raise RunLockedError(
                    f"{self.store.url} is being written to by {owner}: wait for it, stop it, or give"
                    " another output_path"
                )
        return found

    def _swap(self, change: Callable[[RunHead], RunHead]) -> RunHead:
        with self._mutex:
            self.check()
            while True:
                new = replace(change(self._head), serial=self._head.serial + 1)
                generation = self.store.put(HEAD, new.encode(), over=self._generation)
                if generation is not None:
                    self._head, self._generation = new, generation
                    return new
                found = self.store.get(HEAD)
                head = None if found is None else _decoded(self.store, found)
                if found is None or head is None or (head.owner, head.epoch) != (self._me, self._head.epoch):
                    self._fenced = self._taken(None if head is None else head.owner)
                    raise self._fenced
                # A swap of ours that seemed to fail has been made after all: go on from it.
                self._head, self._generation = head, found.generation

    def _taken(self, owner: Owner | None) -> FencedError:
        return FencedError(
            f"{self.store.url}/{HEAD} was changed by another process ({owner or 'which has ended'}): this one"
            f" ({self._me}) gave no sign of life for {self._me.lease:.0f} s, was taken for dead, and does not own the"
            " run any more. It has committed nothing since; whether its last commit was made, run.json tells"
        )

    def _beat(self, every: float) -> None:
        while not self._stop.wait(every):
            try:
                self._swap(lambda head: head)
            except FencedError as error:
                logger.error("%s", error)
                return
            except StoreError as error:
                logger.warning("no sign of life could be given: %s", error)

    def _drop(self, entries: Sequence[CheckpointEntry]) -> None:
        for entry in entries:
            store = next((s for s in (self.store, self.temporary) if (entry.root or self.store.url) == s.url), None)
            if store is None:
                logger.info("%s/%s is left alone: another folder's temporary checkpoint", entry.root, entry.prefix)
            else:
                self._delete_later_if_trouble(store, entry.prefix)

    def _tidy(self, before: RunHead, after: RunHead) -> None:
        """Deletes what of the record and the files is not named any more, and attempts that were given up."""
        kept = {*after.names()}
        with self._mutex:
            given_up, self._given_up = self._given_up, set()
        old = {(self.store, name) for name in (*(s.name for s in before.log), *(f.name for f in before.files))}
        for store, name in old | given_up:
            if name not in kept:
                self._delete_later_if_trouble(store, name)

    def _delete_later_if_trouble(self, store: Store, name: str) -> None:
        try:
            _delete(store, name)
        except StoreError as error:
            logger.warning("%s stays until the next start: %s", name, error)


def _delete(store: Store, name: str) -> None:
    store.delete_under(name) if name.endswith("/") else store.delete(name)


def _decoded(store: Store, found: Found) -> RunHead:
    return RunHead.decode(found.data, where=f"{store.url}/{HEAD}")
