from typing import Protocol

import numpy as np

class Permutation(Protocol):
    def __call__(self, indices: np.ndarray) -> np.ndarray: ...
