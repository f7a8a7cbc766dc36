from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from levanter.data._preprocessor import BatchResult
from levanter.data.dataset import AsyncDataset
from levanter.store.jagged_array import JaggedArrayStore

T_co = TypeVar("T_co", covariant=True)

LEDGER_FILE_NAME: str
CACHE_LAYOUT_CONSOLIDATED: str
CACHE_LAYOUT_SHARDED: str

@dataclass(frozen=True)
class CacheOptions:
    batch_size: int = 128

@dataclass(frozen=True)
class CacheMetadata:
    preprocessor_metadata: dict[str, Any] | None = None

@dataclass
class CacheLedger:
    total_num_rows: int
    shard_rows: dict[str, int]
    is_finished: bool = False
    finished_shards: list[str] = field(default_factory=list[str])
    field_counts: dict[str, int] = field(default_factory=dict[str, int])
    field_counts_by_shard: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    layout: str = "consolidated"
    metadata: CacheMetadata = ...
    @staticmethod
    def load(cache_dir: str, metadata: CacheMetadata | None = None) -> CacheLedger: ...

@dataclass(frozen=True)
class CacheCatalogEntry:
    cache_dir: str
    ledger: CacheLedger

@dataclass(frozen=True)
class CacheCatalog:
    splits: dict[str, dict[str, CacheCatalogEntry]]
    version: int = 1
    def entry(self, split: str, name: str) -> CacheCatalogEntry | None: ...
    @staticmethod
    def load(path: str) -> CacheCatalog: ...
    def write(self, path: str) -> None: ...

class _ShardedJaggedArrayStore:
    offsets: Any
    _cache: TreeCache[Any]
    _field: str

class TreeCache(AsyncDataset[T_co]):
    ledger: CacheLedger
    cache_dir: str
    def __init__(self, cache_dir: str, exemplar: Any, ledger: CacheLedger) -> None: ...
    @staticmethod
    def load(cache_dir: str, exemplar: Any, options: CacheMetadata | None = None) -> TreeCache[Any]: ...
    def __len__(self) -> int: ...
    def is_finite(self) -> bool: ...
    async def async_len(self) -> int: ...
    async def get_batch(self, indices: Sequence[int]) -> Sequence[T_co]: ...
    def get_batch_sync(self, indices_or_slice: Sequence[int] | slice) -> Sequence[T_co]: ...
    def flat_field_length(self, field: str) -> int: ...
    def flat_field_num_rows(self, field: str) -> int: ...
    def jagged_array_tree(self) -> dict[str, JaggedArrayStore | _ShardedJaggedArrayStore]: ...
    def _ensure_shard_field_offsets(self, field: str) -> tuple[list[str], np.ndarray]: ...
    async def _shard_field_store_async(self, shard_name: str, field: str) -> JaggedArrayStore: ...
    async def get_flat_field_batch(self, field: str, offsets: Sequence[int], length: int) -> Sequence[np.ndarray]: ...

class SerialCacheWriter:
    cache_dir: str
    metadata: CacheMetadata | None
    def __init__(
        self,
        cache_dir: str,
        exemplar: Any,
        metadata: CacheMetadata | None = None,
        shard_name: str = "",
        mode: str = "w",
    ) -> None: ...
    def __enter__(self) -> SerialCacheWriter: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None: ...
    def result(self) -> TreeCache[Any]: ...
    def write_batch(self, batch: BatchResult) -> None: ...
