from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from levanter.data.text.datasets import DatasetComponent, dataset_for_component
from levanter.data.text.formats import (
    ChatLmDatasetFormat,
    LmDatasetFormatBase,
    PrebuiltLmDatasetFormat,
    TextLmDatasetFormat,
)

from grug_native.data import token_reader as token_reader_module
from grug_native.data.row_order import BatchReader
from grug_native.data.token_reader import token_reader
from tests.token_caches import EOS, POS, leaves, levanters, make_document, write_cache


def _halved(weights: np.ndarray) -> np.ndarray:
    return weights.astype(np.float64) / 2


CASES: dict[str, tuple[LmDatasetFormatBase, dict[str, Any]]] = {
    "text": (TextLmDatasetFormat(), {}),
    "text without eos": (TextLmDatasetFormat(), {"eos_id": None}),
    "text across documents": (TextLmDatasetFormat(), {"block_cross_document_attention": False}),
    "text of small integers": (TextLmDatasetFormat(), {"dtype": "uint16"}),
    "text of large integers": (TextLmDatasetFormat(), {"dtype": "int64"}),
    "packed": (TextLmDatasetFormat(), {"pack": True}),
    "packed in threes": (TextLmDatasetFormat(), {"pack": 3}),
    "chat": (ChatLmDatasetFormat(), {}),
    "chat, its end, across documents": (
        ChatLmDatasetFormat(slice_strategy="right"),
        {"block_cross_document_attention": False},
    ),
    "chat, the short ones, all turns": (ChatLmDatasetFormat(slice_strategy="drop", mask_user_turns=False), {}),
    "chat, one a sequence": (ChatLmDatasetFormat(), {"pack": False, "longest": POS.size}),
    "prebuilt": (PrebuiltLmDatasetFormat(), {"longest": None}),
    "prebuilt, weighted": (PrebuiltLmDatasetFormat(loss_weights_key="weights"), {"longest": None}),
    "prebuilt, other weights": (
        PrebuiltLmDatasetFormat(loss_weights_key="weights", loss_weight_transform=_halved),
        {"longest": None, "eos_id": None},
    ),
}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sequences_are_those_of_levanter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sharded: bool, held: bool
) -> None:
    """Documents may be longer than a sequence, and sequences lie across shards, of which one is empty."""
    monkeypatch.setattr(token_reader_module, "_HELD_EACH", 2**23 if held else 0)
    format, options = CASES[name]
    longest = options.get("longest", 2 * POS.size)
    rng = np.random.default_rng(len(name))
    shards = [
        [
            make_document(
                rng, int(rng.integers(1, longest + 1)) if longest else POS.size, options.get("dtype", "int32")
            )
            for _ in range(number)
        ]
        for number in (5, 0, 1, 9)
    ]
    dataset = dataset_for_component(
        DatasetComponent(format=format, pack=options.get("pack")),
        POS,
        write_cache(tmp_path, shards, sharded=sharded),
        eos_id=options.get("eos_id", EOS),
        block_cross_document_attention=options.get("block_cross_document_attention", True),
    )
    assert token_reader(dataset) is not None
    reader = BatchReader(dataset)
    assert reader.length is not None and reader.length >= 6
    rows = [*rng.permutation(reader.length).tolist(), 1, 1]
    mine, theirs = reader.read(np.array(rows)), levanters(dataset, rows)
    assert leaves(mine) == leaves(theirs)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
