from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from haliax.axis import Axis
from jax import Array

@dataclass(frozen=True)
class NamedArray:
    array: Array
    @property
    def axes(self) -> tuple[Axis, ...]: ...
    def rearrange(self, axes: Sequence[Axis | str]) -> NamedArray: ...

def named(a: Array | np.ndarray, axis: Axis | str | Sequence[Axis | str]) -> NamedArray: ...
