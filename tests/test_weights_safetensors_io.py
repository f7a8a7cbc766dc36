import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from grug_native.weights.safetensors_io import INDEX_FILE, DtypeName, TensorFolder, write_tensors

TENSORS = {f"t{n}": np.random.default_rng(n).normal(size=(n + 2, 3)).astype(np.float32) for n in range(5)}


def written(folder: Path, dtype: DtypeName = "float32", *, shard_bytes: int = 80) -> Path:
    """By default four files: tensors of 24 to 72 bytes."""
    folder.mkdir(parents=True)
    shapes = {name: tensor.shape for name, tensor in TENSORS.items()}
    size = write_tensors(folder, shapes, iter(TENSORS.values()), dtype, shard_bytes=shard_bytes)
    assert size == sum(tensor.size for tensor in TENSORS.values()) * (4 if dtype == "float32" else 2)
    return folder


def test_the_library_alone_reads_the_files_and_their_index(tmp_path: Path) -> None:
    folder = written(tmp_path / "many")
    index = json.loads((folder / INDEX_FILE).read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)}
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(folder / file)[name], TENSORS[name])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in folder.glob("*.safetensors")) <= 80


def test_one_file_needs_no_index_and_bf16_rounds(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", "bfloat16", shard_bytes=10**6)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor.astype(ml_dtypes.bfloat16))
    read = TensorFolder(folder).read("t1", (slice(1, 3), slice(None)))
    np.testing.assert_array_equal(read, TENSORS["t1"][1:].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_tensor_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    bad = {"a": np.ones((2, 2), np.float32), "b": np.full((2,), np.nan, np.float32)}
    with pytest.raises(ValueError, match="b is not finite in float32"):
        write_tensors(tmp_path, {name: t.shape for name, t in bad.items()}, bad.values(), "float32")


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def half(folder: Path) -> None:
    data = first_file(folder).read_bytes()
    first_file(folder).write_bytes(data[: len(data) // 2])


def edit_index(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][name] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))


def integers(folder: Path) -> None:
    save_file({name: np.ones((2, 3), np.int8) for name in load_file(first_file(folder))}, first_file(folder))


def pickled(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (half, r"model-00001-of-00004\.safetensors is damaged: .*Fetch it anew"),
        (lambda folder: first_file(folder).write_bytes(b""), "is damaged"),
        (lambda folder: first_file(folder).unlink(), "that t0 is in model-00001-of-00004.safetensors, and there is no"),
        (lambda folder: edit_index(folder, "t9", first_file(folder).name), "that t9 is in model-00001.*not there"),
        (lambda folder: edit_index(folder, "t0", "../x.safetensors"), r"t0 is in \.\./x\.safetensors, and there is no"),
        (lambda folder: (folder / INDEX_FILE).write_text("{}"), "is no index of tensors"),
        (lambda folder: (folder / INDEX_FILE).unlink(), "has 4 safetensors files, and no model.safetensors.index.json"),
        (integers, "t0 is of dtype I8, and read are F32, BF16, F16"),
        (pickled, r"its weights in pytorch_model\.bin only\. Those are pickles, .* nothing is ever unpickled here"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "has no weights"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(damage: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    folder = shutil.copytree(written(tmp_path / "sound"), tmp_path / "damaged")
    assert TensorFolder(folder).shapes == {name: tensor.shape for name, tensor in TENSORS.items()}
    damage(folder)
    with pytest.raises(ValueError, match=words):
        TensorFolder(folder)
