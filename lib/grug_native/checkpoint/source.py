"""Where checkpoints are read from: a folder of this machine, or what behaves like one.

Light to import: `grug ckpt` lists and compares checkpoints with neither JAX nor a device.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, final, override, runtime_checkable

import numpy as np

from grug_native.checkpoint.digest import CheckpointReader, read_leaves, verify_files
from grug_native.checkpoint.metadata import CheckpointMetadata, DamagedCheckpointError, LeafRecord, read_metadata
from grug_native.host.run_folder import committed_steps, find_checkpoint, quarantined, step_name

if TYPE_CHECKING:
    import jax

    from grug_native.checkpoint.leaves import Leaf


@runtime_checkable
class CheckpointSource(Protocol):
    """One committed checkpoint, to be read; as text, where it is."""

    @property
    def name(self) -> str:
        """What it is called among its run's."""
        ...

    def exists(self) -> bool:
        """Whether its run still has it."""
        ...

    def read_metadata(self) -> CheckpointMetadata:
        """Reads what it says about itself; raises as `metadata.read_metadata`."""
        ...

    def read_leaf(self, leaf: str) -> np.ndarray:
        """Reads an array, and verifies it; a random key is its uint32 words.

        Raises:
            DamagedCheckpointError: It cannot be read, or is not what was saved.
        """
        ...

    def verify(self, metadata: CheckpointMetadata) -> list[str]:
        """Reads every array, one at a time; returns what is wrong, a sentence a leaf."""
        ...

    def load(self, stored: Mapping[str, LeafRecord], wanted: "Mapping[str, Leaf]") -> "dict[str, jax.Array]":
        """Loads arrays onto devices, not proven yet; see `leaves.load_stored`."""
        ...


@runtime_checkable
class Checkpoints(Protocol):
    """The checkpoints of a run, to be read; as text, where they are."""

    def steps(self) -> list[int]:
        """Returns the steps of the committed ones, newest first."""
        ...

    def every(self) -> Sequence[CheckpointSource]:
        """Returns the committed ones, newest first."""
        ...

    def find(self, step: int | None) -> CheckpointSource:
        """Returns the one of `step`, the newest for None.

        Raises:
            ValueError: There is none.
        """
        ...

    def damaged(self) -> list[str]:
        """Returns the names of those that were set aside as damaged."""
        ...


@final
class FolderCheckpoint:
    """A `step-N` folder."""

    def __init__(self, path: Path):
        self._path = path

    @override
    def __str__(self) -> str:
        return str(self._path)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._path.name

    def exists(self) -> bool:
        """Whether the folder is there."""
        return self._path.exists()

    def read_metadata(self) -> CheckpointMetadata:
        """Reads what it says about itself; that it is of another step than its name says, is damage."""
        metadata = read_metadata(self._path)
        if self._path.name != step_name(metadata.step):
            raise DamagedCheckpointError(f"{self._path} holds step {metadata.step}")
        return metadata

    def read_leaf(self, leaf: str) -> np.ndarray:
        """Reads an array, and verifies it."""
        return read_leaves(self._path, [leaf])[leaf]

    def verify(self, metadata: CheckpointMetadata) -> list[str]:
        """Reads every array; returns what is wrong."""
        return verify_files(self._path, metadata)

    def load(self, stored: Mapping[str, LeafRecord], wanted: "Mapping[str, Leaf]") -> "dict[str, jax.Array]":
        """Loads arrays onto devices."""
        from grug_native.checkpoint.leaves import load_stored

        return load_stored(CheckpointReader(self._path), stored, wanted)


@final
class FolderCheckpoints:
    """A run's `checkpoints/`."""

    def __init__(self, folder: Path):
        self._folder = folder

    @override
    def __str__(self) -> str:
        return str(self._folder)

    def steps(self) -> list[int]:
        """Returns the steps of the `step-N` folders, newest first."""
        return committed_steps(self._folder)

    def every(self) -> list[FolderCheckpoint]:
        """Returns the `step-N` folders, newest first."""
        return [FolderCheckpoint(self._folder / step_name(step)) for step in committed_steps(self._folder)]

    def find(self, step: int | None) -> FolderCheckpoint:
        """Returns the one of `step`, the newest for None; a ValueError if there is none."""
        return FolderCheckpoint(find_checkpoint(self._folder, step))

    def damaged(self) -> list[str]:
        """Returns the names of the `.corrupt-*` folders."""
        return [path.name for path in quarantined(self._folder)]
