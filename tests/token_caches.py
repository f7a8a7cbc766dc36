"""Token caches of levanter's for tests, and what levanter makes of them."""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from haliax import Axis
from levanter.data.dataset import AsyncDataset
from levanter.data.text.examples import GrugLmExample
from levanter.store.cache import CacheLedger, CacheMetadata, SerialCacheWriter, TreeCache

POS = Axis("position", 16)
EOS = 9

type Leaves = list[tuple[str, tuple[int, ...], bytes]]
type Document = dict[str, np.ndarray]


def leaves(batch: object) -> Leaves:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    return [(str(array.dtype), array.shape, array.tobytes()) for array in arrays]


def levanters(dataset: AsyncDataset[GrugLmExample], rows: list[int]) -> GrugLmExample:
    """The sequences that levanter makes one by one, stacked."""
    examples = dataset.as_sync_dataset().get_batch(rows)
    return jax.tree.map(lambda *parts: np.stack([np.asarray(part) for part in parts]), *examples)


def write_cache(root: Path, shards: list[list[Document]], *, sharded: bool) -> TreeCache[Document]:
    """A token cache of levanter in one piece, or with a ledger over several."""
    exemplar = next(document for shard in shards for document in shard)
    if not sharded:
        with SerialCacheWriter(str(root), exemplar, CacheMetadata({})) as writer:
            writer.write_batch([document for shard in shards for document in shard])
        return TreeCache.load(str(root), exemplar)
    ledger = CacheLedger(total_num_rows=0, shard_rows={}, is_finished=True, layout="sharded")
    ledger.field_counts = dict.fromkeys(exemplar, 0)
    for number, shard in enumerate(shards):
        name = f"part-{number}"
        ledger.finished_shards.append(name)
        ledger.shard_rows[name] = len(shard)
        ledger.total_num_rows += len(shard)
        if shard:
            with SerialCacheWriter(str(root / name), exemplar, CacheMetadata({}), shard_name=name) as writer:
                writer.write_batch(shard)
            sizes = {field: sum(len(document[field]) for document in shard) for field in exemplar}
            ledger.field_counts_by_shard[name] = sizes
            for field, size in sizes.items():
                ledger.field_counts[field] += size
    (root / "shard_ledger.json").write_text(json.dumps(asdict(ledger)))
    return TreeCache.load(str(root), exemplar)


def make_document(rng: np.random.Generator, size: int, dtype: str) -> Document:
    tokens = rng.integers(0, EOS, size).astype(dtype)
    tokens[-1] = EOS
    return {
        "input_ids": tokens,
        "assistant_masks": rng.integers(0, 2, size).astype(np.int32),
        "weights": rng.normal(size=size).astype(np.float32),
    }
