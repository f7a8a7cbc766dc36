"""Keys and values of the positions read so far, for models that attend to them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from grug_native.attention import attend, attention, visible
from grug_native.layers import LayerState
from grug_native.sharding import BATCH_AXES, reshard
from grug_native.types import AttentionMask

_UNREAD = -2
"""Segment of what stands behind the positions read so far."""


class LayerCache(LayerState):
    """Keys and values of one layer; or of all, with a leading axis of layers.

    What a head reads lies together: the two products of a token's attention are then read once and copied never. With
    positions before heads, as queries have them, they took ten times as long on a CPU.
    """

    keys: Float[Array, "*L B N K E"]
    """Rotated."""
    values: Float[Array, "*L B N K E"]


class KeyValueCache(eqx.Module):
    """Keys and values of all layers, at the positions read so far. On a mesh, the batch and the heads are split."""

    layers: PyTree
    """A `LayerCache` of all layers, or the `PerLayer` that `through_layers` makes of it; or several of them, of layers
    that are not all alike."""
    segment_ids: Int[Array, "B K"]
    """Of the positions read; texts of several lengths begin with padding, which has a segment of its own."""
    length: Int[Array, ""]
    """Positions read."""
    is_empty: bool = eqx.field(static=True, default=False)
    """Whether there are none."""

    @staticmethod
    def empty(layers: int, batch: int, length: int, heads: int, features: int, dtype: str) -> "KeyValueCache":
        """A cache with room for `length` positions."""
        numbers = jnp.zeros((layers, batch, heads, length, features), dtype)
        numbers = reshard(numbers, None, BATCH_AXES, "model", None, None)
        segment_ids = reshard(jnp.full((batch, length), _UNREAD, jnp.int32), BATCH_AXES, None)
        return KeyValueCache(LayerCache(numbers, numbers), segment_ids, jnp.zeros((), jnp.int32), is_empty=True)

    def read(self, tokens: Int[Array, "B S"], mask: AttentionMask) -> "Reading":
        """What the layers have to know to read `tokens` after what the cache holds."""
        own = jnp.zeros_like(tokens) if mask.segment_ids is None else mask.segment_ids[0]
        segment_ids = jax.lax.dynamic_update_slice_in_dim(self.segment_ids, own, self.length, axis=1)
        return Reading(self.length + jnp.arange(tokens.shape[1]), own, segment_ids, is_first=self.is_empty)

    def after(self, reading: "Reading", layers: PyTree) -> "KeyValueCache":
        """The cache that the layers have made longer."""
        return KeyValueCache(layers, reading.key_segments, reading.positions[-1] + 1)


class Reading(eqx.Module):
    """Where tokens stand that are read after others."""

    positions: Int[Array, " S"]
    """Their positions."""
    segments: Int[Array, "B S"]
    """Their documents."""
    key_segments: Int[Array, "B K"]
    """Those of all positions, theirs among them."""
    is_first: bool = eqx.field(static=True, default=False)
    """Whether there is nothing before them: then they see each other only, and any kernel will do."""

    def attend(
        self,
        q: Float[Array, "B S H E"],
        k: Float[Array, "B S N E"],
        v: Float[Array, "B S N E"],
        mask: AttentionMask,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B S H E"], LayerCache]:
        """Attention of the tokens over all positions; returns a layer's keys and values with theirs among them."""
        start = self.positions[0]
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2), start, axis=2)
            for old, new in ((cache.keys, k), (cache.values, v))
        )
        longer = LayerCache(keys, values)
        if self.is_first:
            return attention(q, k, v, mask), longer
        seen = visible(mask, self.positions, jnp.arange(keys.shape[2]), (self.segments, self.key_segments))
        return attend(q, keys, values, seen), longer
