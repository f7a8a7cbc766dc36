"""Tensors in a folder of safetensors files: written one after the other, and read block by block.

Nothing here is ever unpickled, and neither way holds more than one tensor in memory.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast, final

import ml_dtypes
import numpy as np

DtypeName = Literal["bfloat16", "float32"]
"""Of the tensors that are written."""

INDEX_FILE = "model.safetensors.index.json"
"""Says of several files which tensor is in which."""

SHARD_BYTES = 5 * 10**9
"""A file holds so many at most, if no single tensor has more."""

_DTYPES: dict[DtypeName, tuple[str, np.dtype]] = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float32": ("F32", np.dtype(np.float32)),
}
_READABLE = ("F32", "BF16", "F16")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ALIGNMENT = 8


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[np.ndarray],
    dtype: DtypeName,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes tensors into one file, or into several with an index.

    Args:
        folder: where to.
        shapes: of all tensors, in the order in which they come.
        tensors: one after the other.
        dtype: of what is written.
        shard_bytes: of a file, at most.

    Returns:
        Bytes of all tensors.

    Raises:
        ValueError: a tensor is not finite.
        OSError: they cannot be written.
    """
    code, kind = _DTYPES[dtype]
    sizes = {name: int(np.prod(shape, dtype=np.int64)) * kind.itemsize for name, shape in shapes.items()}
    shard_of = _shards(sizes, shard_bytes)
    count = max(shard_of.values())
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    files = files if count > 1 else ["model.safetensors"]
    coming = iter(tensors)
    for number, names in groupby(shapes, shard_of.__getitem__):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        held, end = list(names), 0
        for name in held:
            header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        with (folder / files[number - 1]).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in held:
                tensor = next(coming).astype(kind)
                assert tensor.shape == tuple(shapes[name]), name
                if not np.isfinite(tensor).all():
                    raise ValueError(f"{name} is not finite in {dtype}")
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: files[number - 1] for name, number in shard_of.items()},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
    return sum(sizes.values())


def _shards(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """The number of the file of each tensor, from 1 on."""
    shard_of: dict[str, int] = {}
    number, room = 1, most
    for name, size in sizes.items():
        if size > room and room < most:
            number, room = number + 1, most
        shard_of[name], room = number, room - size
    return shard_of


@final
class TensorFolder:
    """The tensors of a folder, read as they are asked for."""

    def __init__(self, folder: Path):
        """Opens the files, and reads what they say of themselves.

        Raises:
            ValueError: names the file that is missing or damaged, or of a kind that is not read.
        """
        files = _weight_map(folder)
        opened = {file: _opened(folder / file) for file in dict.fromkeys(files.values())}
        held = {file: set(tensors.keys()) for file, tensors in opened.items()}
        for name, file in files.items():
            if name not in held[file]:
                raise ValueError(f"{folder / INDEX_FILE} says that {name} is in {file}, and it is not there")
        self._slices: dict[str, Any] = {name: opened[file].get_slice(name) for name, file in files.items()}
        for name, tensor in self._slices.items():
            if tensor.get_dtype() not in _READABLE:
                raise ValueError(
                    f"{folder}: {name} is of dtype {tensor.get_dtype()}, and read are {', '.join(_READABLE)}"
                )
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(t.get_shape()) for n, t in self._slices.items()}
        """By name."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a block of a tensor, as f32."""
        return np.asarray(self._slices[name][index], np.float32)


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    index, files = folder / INDEX_FILE, sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        try:
            listed = json.loads(index.read_text())["weight_map"].items()
            known = {str(name): str(file) for name, file in listed}
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of tensors: {error!r}") from error
        for name, file in known.items():
            if file not in files:
                raise ValueError(f"{index} says that {name} is in {file}, and there is no such file in its folder")
        return known
    if len(files) == 1:
        return dict.fromkeys(_opened(folder / files[0]).keys(), files[0])
    if files:
        raise ValueError(f"{folder} has {len(files)} safetensors files, and no {INDEX_FILE} that says what is in which")
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} has its weights in {', '.join(pickled)} only. Those are pickles, which run code when they are "
            "read, and nothing is ever unpickled here: have transformers save the model as safetensors, where you "
            "trust it"
        )
    raise ValueError(f"{folder} has no weights: no *.safetensors is there")


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return cast(Any, safe_open)(str(file), framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Fetch it anew") from error
