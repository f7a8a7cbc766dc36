from typing import Any

import tensorstore as ts

class JaggedArrayStore:
    offsets: Any
    data: ts.TensorStore
    @property
    def data_size(self) -> int: ...
