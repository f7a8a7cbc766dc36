from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from jax import Array
from levanter.data.dataset import AsyncDataset

T = TypeVar("T")

class StopStrategy:
    FIRST_STOP_STRATEGY: str

class MixtureDataset(AsyncDataset[T]):
    weight_stages: list[tuple[int, dict[str, float]]]
    datasets: dict[str, AsyncDataset[T]]
    dataset_index: list[str]
    block_size: int
    stop_strategy: str
    def __init__(
        self,
        datasets: Mapping[str, AsyncDataset[T]],
        weights: dict[str, float] | list[tuple[int, dict[str, float]]],
        block_size: int,
        *,
        randomize_blocks: bool = True,
        key: Array | int,
        stop_strategy: str = "restart",
        start_offsets: Mapping[str, int] | None = None,
    ) -> None: ...
    async def async_len(self) -> int: ...
    def is_finite(self) -> bool: ...
    async def get_batch(self, indices: Sequence[int]) -> Sequence[T]: ...
    def _get_block(self, index: int) -> np.ndarray: ...
    def _index_into_dataset_for_id(self, id: int, block_id: int) -> tuple[int, int]: ...

class ConcatDataset(AsyncDataset[T]):
    datasets: dict[str, AsyncDataset[T]]
    def __init__(self, datasets: Mapping[str, AsyncDataset[T]]) -> None: ...
    async def async_len(self) -> int: ...
    def is_finite(self) -> bool: ...
    async def get_batch(self, indices: Sequence[int]) -> Sequence[T]: ...
