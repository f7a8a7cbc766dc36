from typing import Any

from jax import Array
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

def fused_linear_softmax_cross_entropy_loss(
    hidden: Array,
    lm_head: Array,
    labels: Array,
    *,
    weight: Array | None = None,
    reduction: str = "mean",
    logsumexp_weight: float | None = None,
    dtype: DTypeLike = ...,
    precision: PrecisionLike = None,
    implementation: str | tuple[str, ...] | None = None,
    block_sizes: Any = None,
    grad_in_forward_token_block_size: int | None = None,
) -> Array: ...
