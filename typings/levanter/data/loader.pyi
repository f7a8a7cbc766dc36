from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import jax
from haliax import Axis
from haliax.partitioning import ResourceMapping
from jax.sharding import Mesh
from levanter.data.dataset import AsyncDataset
from levanter.schedule import BatchSchedule, IntSchedule

Ex = TypeVar("Ex")

class DataLoader(Iterable[Ex]):
    max_buffered_batches: int | None
    axis_resources: ResourceMapping | None
    data_store: AsyncDataset[Ex]
    mesh: Mesh
    batch_axis_name: str
    scheduler: BatchSchedule
    def __init__(
        self,
        data: AsyncDataset[Ex],
        batch_size: int | IntSchedule | Axis,
        *,
        batch_axis_name: str | None = None,
        max_buffered_batches: int | None = 64,
        mesh: Mesh | None = None,
        axis_resources: ResourceMapping | None = None,
        fetch_batch_size: int = 32,
        pad_final_batch: bool = True,
        allow_nondivisible_batch_size: bool = False,
    ) -> None: ...
    def local_data_indices_by_device_for_step(self, step: int) -> dict[jax.Device, range]: ...
    def iter_from_step(self, start_from_batch: int | None = None) -> DataLoaderIterator[Ex]: ...
    def has_len(self) -> bool: ...
    def __iter__(self) -> DataLoaderIterator[Ex]: ...
    def __len__(self) -> int: ...

class DataLoaderIterator(Iterator[Ex], Generic[Ex]):
    def __next__(self) -> Ex: ...
    def close(self) -> None: ...
