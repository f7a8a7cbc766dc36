"""What the processes of one run tell each other."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def told(value: Any) -> Any:
    """Returns what process 0 says, as plain JSON data, on every process."""
    if jax.process_count() == 1:
        return value
    data = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    if data:
        padded[:] = np.frombuffer(data, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
