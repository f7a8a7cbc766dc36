from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from levanter.data.dataset import (
    AsyncDataset,
    BlockShufflingDataset,
    PermutationDataset,
    SlicedAsyncDataset,
)
from levanter.data.mixture import ConcatDataset, MixtureDataset
from levanter.data.text.datasets import DatasetComponent, dataset_for_component
from levanter.data.text.examples import GrugLmExample

from grug_native.data.row_order import BatchReader
from grug_native.data.vocabulary_check import VocabCheckedDataset
from tests.token_caches import EOS, POS, leaves, levanters, make_document, write_cache

type Dataset = AsyncDataset[GrugLmExample]

SEQUENCES = (3, 11, 40)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Datasets of 3, 11 and 40 sequences, compiled once."""
    rng = np.random.default_rng(0)
    datasets: list[Dataset] = []
    for size in SEQUENCES:
        folder = tmp_path_factory.mktemp("cache") / "train"
        shards = [[make_document(rng, POS.size, "int32")] * (size - 2), [make_document(rng, 2 * POS.size + 3, "int32")]]
        shards[0] = [make_document(rng, POS.size, "int32") for _ in shards[0]]
        cache = write_cache(folder, shards, sharded=True)
        dataset = dataset_for_component(DatasetComponent(), POS, cache, eos_id=EOS, block_cross_document_attention=True)
        datasets.append(VocabCheckedDataset(dataset=dataset, name=str(size), vocab_size=EOS + 1))
    return datasets


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    """How one part of a mixture comes: its wrappers from the inside out."""
    perm_type = draw(st.sampled_from(["feistel", "linear"]))
    return {
        "concat": draw(st.booleans()),
        "shuffle_first": draw(st.booleans()),
        "slice": draw(st.sampled_from([None, (0, 2), (1, None), (1, 3)])),
        "shuffle": draw(st.sampled_from([None, "full", "blocks"])),
        "perm_type": perm_type,
        "io_block_size": draw(st.integers(1, 5)),
        "window_blocks": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 9)),
    }


def ordered(dataset: Dataset, others: list[Dataset], order: Mapping[str, Any]) -> Dataset:
    key = jax.random.key(order["seed"])
    if order["concat"]:
        dataset = ConcatDataset({"one": dataset, "two": others[order["seed"] % len(others)]})
    if order["shuffle_first"]:
        dataset = PermutationDataset(dataset, key)
    if order["slice"] is not None:
        dataset = SlicedAsyncDataset(dataset, *order["slice"])
    if order["shuffle"] == "full":
        return PermutationDataset(dataset, key, perm_type=order["perm_type"])
    if order["shuffle"] == "blocks":
        return BlockShufflingDataset(
            dataset,
            order["io_block_size"],
            window_blocks=order["window_blocks"],
            key=key,
            perm_type=order["perm_type"],
        )
    return dataset


@settings(max_examples=15, deadline=None)
@given(
    parts=st.lists(orders(), min_size=1, max_size=3),
    weights=st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=1, max_size=3),
    stop_strategy=st.sampled_from(["restart", "all_exhausted", "first_exhausted"]),
    randomize=st.booleans(),
    data=st.data(),
)
def test_the_order_is_levanters(
    texts: list[Dataset],
    parts: list[dict[str, Any]],
    weights: list[list[int]],
    stop_strategy: str,
    randomize: bool,
    data: st.DataObject,
) -> None:
    names = [f"part{number}" for number in range(len(parts))]
    datasets = {
        name: ordered(texts[number], texts, order)
        for number, (name, order) in enumerate(zip(names, parts, strict=True))
    }
    stages = [
        (24 * stage, dict(zip(names, map(float, shares[: len(names)]), strict=True)))
        for stage, shares in enumerate(weights)
    ]
    mixture = MixtureDataset(
        datasets, stages, 12, randomize_blocks=randomize, key=jax.random.key(3), stop_strategy=stop_strategy
    )
    reader = BatchReader(mixture)
    assert reader.length == (len(mixture.as_sync_dataset()) if mixture.is_finite() else None)
    end = 150 if reader.length is None else reader.length
    rows = data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=12))
    try:
        theirs = levanters(mixture, rows)
    except (ValueError, IndexError):  # Shuffled blocks ask a part for more than it has, if nothing is begun anew.
        assert stop_strategy == "first_exhausted"
        with pytest.raises((ValueError, IndexError)):
            reader.read(np.array(rows))
    else:
        assert leaves(reader.read(np.array(rows))) == leaves(theirs)
