"""The axis legend and the shared array types. One letter means one thing in the whole package.

| letter | axis |
|---|---|
| `B` | sequences of the global batch |
| `S` | positions of a sequence (queries, and keys when `K` is absent) |
| `K` | key positions |
| `D` | hidden (residual) features |
| `F` | intermediate (MLP) features |
| `H` | query heads; `N` key/value heads; `G` query heads per key/value head |
| `E` | features of one head |
| `Q` | `H * E`; `P`: `N * E` |
| `V` | vocabulary |
| `L` | layers |
| `T` | flattened tokens, `B * S` |
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int, TypeCheckError, jaxtyped

if TYPE_CHECKING:
    from jaxlib._jax import Device as Device
else:  # jax gives the class as a variable, which a type checker does not take for a type.
    Device = jax.Device

type Scalar = Float[Array, ""]
type Tokens = Int[Array, "B S"]
type Hidden = Float[Array, "B S D"]
type DenseMask = Bool[Array, "B S K"]


@runtime_checkable
class AttentionMask(Protocol):
    """What levanter's `levanter.grug.attention.AttentionMask` offers, seen without importing levanter.

    A query at position `s` may attend to the key at position `k` iff every condition that is set holds:
    `is_causal` (`k <= s`), `sliding_window` of `W` tokens (`k > s - W`, itself included), and equal `segment_ids`.
    """

    @property
    def is_causal(self) -> bool:
        """Whether later positions are hidden."""
        ...

    @property
    def segment_ids(self) -> tuple[Array, Array] | None:
        """Documents of queries and keys, each (B, S); None where all is one document."""
        ...

    @property
    def sliding_window(self) -> int | None:
        """Positions that a query sees, itself included; None for all."""
        ...


@runtime_checkable
class LmBatch(Protocol):
    """What levanter's `GrugLmExample` offers, seen without importing levanter (which takes ten seconds).

    `GrugLmExample` is the only batch class; this is its shape. `loss_weight[b, s]` weighs the prediction of
    `tokens[b, s + 1]`, so the last position of each row has weight 0.
    """

    @property
    def tokens(self) -> Array:
        """Token ids, Int (B, S)."""
        ...

    @property
    def loss_weight(self) -> Array:
        """Weights of the predictions, Float (B, S)."""
        ...

    @property
    def attn_mask(self) -> AttentionMask:
        """Who may attend to whom."""
        ...


@jaxtyped(typechecker=None)
def check_batch(
    tokens: Array, loss_weight: Array, query_segment_ids: Array | None, key_segment_ids: Array | None
) -> None:
    """Checks shapes and dtypes of a batch's fields. It runs while a step is traced, so a running step pays nothing.

    Raises:
        jaxtyping.TypeCheckError: naming the field, the shape found and the shape wanted.
    """
    fields: dict[str, tuple[Array | None, Any]] = {
        "tokens": (tokens, Int[Array, "B S"]),
        "loss_weight": (loss_weight, Float[Array, "B S"]),
        "query_segment_ids": (query_segment_ids, Int[Array, "B S"]),
        "key_segment_ids": (key_segment_ids, Int[Array, "B S"]),
    }
    for name, (field, wanted) in fields.items():
        if field is not None and not isinstance(field, wanted):
            raise TypeCheckError(
                f"the batch's {name} is {jax.typeof(field).str_short(short_dtypes=True)}, and must be "
                f"{wanted.dtype.__name__}[B S], with one B and one S for all fields; tokens is "
                f"{jax.typeof(tokens).str_short(short_dtypes=True)}"
            )


def check_lm_batch(batch: LmBatch) -> None:
    """`check_batch` of a `GrugLmExample`."""
    check_batch(batch.tokens, batch.loss_weight, *(batch.attn_mask.segment_ids or (None, None)))


def check_seed(name: str, seed: int) -> None:
    """Refuses a seed that JAX cannot tell apart from another, or not take: a `ValueError` names it."""
    if not -(2**31) <= seed < 2**32:
        raise ValueError(f"{name}={seed} must lie in [-2147483648, 4294967295]: JAX draws from 32 bits of it")
