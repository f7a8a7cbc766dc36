from collections.abc import Sequence
from typing import Literal

import numpy as np
from levanter.store.cache import _ShardedJaggedArrayStore
from levanter.store.jagged_array import JaggedArrayStore

class GreedyPrepackedDataset:
    dataset: dict[str, JaggedArrayStore | _ShardedJaggedArrayStore]
    slice_strategy: Literal["left", "right", "raise", "drop"]
    _offsets: dict[str, np.ndarray]
    _pack_indices: list[range]

def pack_documents(
    lengths: np.ndarray | dict[str, np.ndarray],
    max_length: int,
    max_segments_per_example: int | None = None,
    slice_strategy: Literal["left", "right", "raise", "drop"] = "raise",
) -> Sequence[range]: ...
