"""Writing a model as a Hugging Face folder: whole or not at all, one parameter in memory at a time."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grug_native.data.corpus_making import scratch_folder, sweep_scratch
from grug_native.host.run_folder import fsync, settle_tree
from grug_native.weights.hf_tensors import Tensors
from grug_native.weights.safetensors_io import SHARD_BYTES, DtypeName, write_tensors

logger = logging.getLogger(__name__)


def check_output(output: str | Path) -> Path:
    """Refuses, before anything is read, a place where no folder can be made.

    Raises:
        ValueError: it exists, is none of this machine, or has no folder to be in.
    """
    path = Path(os.path.abspath(output))
    if "://" in str(output):
        raise ValueError(f"output={str(output)!r} must be a folder of this machine: copy it to the bucket afterwards")
    if os.path.lexists(path):
        raise ValueError(f"output={str(output)!r} exists, and is left as it is: give a new folder")
    if not path.parent.is_dir():
        raise ValueError(f"output={str(output)!r}: there is no folder {path.parent}")
    return path


def write_hf_folder(
    output: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensors],
    read: Callable[[str], np.ndarray],
    *,
    dtype: DtypeName,
    card: str,
    write_tokenizer: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the folder under a hidden name, and renames it when all of it is on the disk.

    Args:
        output: as `check_output` returned it.
        config: `config.json`, but for the dtype.
        tensors: of each parameter, by its dotted path.
        read: gives a parameter by its path; asked for each once, in order.
        dtype: of the tensors that are written.
        card: the text of `README.md`.
        write_tokenizer: writes the tokenizer's files into a folder.
        shard_bytes: of a file of tensors, at most.

    Raises:
        ValueError: a parameter is not finite; or the folder exists by now.
        OSError: it cannot be written; nothing of it is left.
    """
    shapes = {name: of_one.shape for of_one in tensors.values() for name in of_one.names}
    key = hashlib.sha256(output.name.encode()).hexdigest()[:16]
    sweep_scratch(output.parent)
    try:
        with scratch_folder(output.parent, key) as scratch:
            made = scratch / output.name
            made.mkdir()
            size = write_tensors(made, shapes, _all_tensors(tensors, read), dtype, shard_bytes=shard_bytes)
            write_tokenizer(made)
            ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
            _write_json(made / "config.json", dict(config) | {"torch_dtype": dtype})
            _write_json(made / "generation_config.json", {"_from_model_config": True} | ids)
            (made / "README.md").write_text(card)
            settle_tree(made)
            check_output(output)
            made.rename(output)
            fsync(output.parent)
    except OSError as error:
        way_out = "what was written of it is removed; make room, or give another output"
        raise OSError(
            error.errno, f"the export cannot be written ({error.strerror}): {way_out}", str(output)
        ) from error
    logger.info("exported %d tensors, %s bytes in %s: %s", len(shapes), f"{size:,}", dtype, output)


def _all_tensors(tensors: Mapping[str, Tensors], read: Callable[[str], np.ndarray]) -> Iterator[np.ndarray]:
    for leaf, of_leaf in tensors.items():
        yield from of_leaf.split(read(leaf))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
