"""What models are built of: norms, products and lookups that know the mesh, and layers stacked into one module."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from grug_native.kernels.backend import Backend, current_backend
from grug_native.kernels.choices import note_choice
from grug_native.language_model import weight
from grug_native.sharding import BATCH_AXES, explicit_mesh, is_gathered, out_sharding, unshard

RematName = Literal["auto", "none", "dots", "full"]
"""What the backward pass recomputes: nothing, all but matrix products, or whole blocks; `auto` as memory allows."""

ScanName = bool | Literal["auto"]
"""One compiled layer in a loop, or the layers unrolled; `auto` scans where there are many of them."""

_MOST_UNROLLED_LAYERS: dict[str, int] = {"cpu": 48, "gpu": 48, "tpu": 8}
"""Unrolled layers run faster (of a 124M model on an H200 by 27%), and compile longer (there 24 of them in 14 s)."""

_STATE_BYTES = 20
"""Of a parameter: itself, two moments and its gradient in f32, and room for its copy in bf16 and for its average."""
_USABLE_MEMORY = 0.85
"""Share of a device's memory; the rest is for the logits, a block's own work, and what fragments."""


class LayerState(eqx.Module):
    """What a layer hands to its next call, such as keys and values: a class of them derives from this one.

    Those of layers that are applied one by one are kept apart and not stacked, so that a loop changes each where it
    lies and copies none.
    """


class PerLayer(eqx.Module):
    """The states of layers that are applied one by one."""

    states: tuple[LayerState, ...]


class RMSNorm(eqx.Module):
    """Root-mean-square normalisation, computed in f32.

    References:
        Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    weight: Float[Array, " D"] = eqx.field(metadata=weight("norm", None))

    def __call__(self, x: Float[Array, "*batch D"], *, eps: float) -> Float[Array, "*batch D"]:
        """Normalises each position; `eps` is added to the mean square."""
        normalized, gain = rms_normalize(x.astype(jnp.float32), eps=eps), self.weight.astype(jnp.float32)
        if is_gathered(gain):
            # A product to JAX, which adds its gradient up later; XLA multiplies element by element all the same.
            return jnp.einsum("...d,d->...d", normalized, gain).astype(x.dtype)
        return (normalized * gain.reshape(*(1 for _ in x.shape[1:]), -1)).astype(x.dtype)


def rms_normalize(x: Float[Array, "*batch D"], *, eps: float) -> Float[Array, "*batch D"]:
    """Divides by the root mean square of the last axis, in f32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float) -> Array:
    """Draws a weight: a normal of standard deviation `std`, truncated at three of them, in f32."""
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)


def embed_tokens(table: Float[Array, "V D"], tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Rows of an embedding that is split over `model` and `data`."""
    # Read in f32, so that the gradient's scatter adds in f32: in bf16 the sum for a common token stalls.
    whole = unshard(table, None, None).astype(jnp.float32)
    return whole.at[tokens].get(out_sharding=out_sharding(BATCH_AXES, None, None)).astype(table.dtype)


def to_logits(hidden: Float[Array, "*batch D"], head: Float[Array, "D V"]) -> Float[Array, "*batch V"]:
    """Products with a head that is split over `data` and `model`, in f32."""
    whole = unshard(head, None, "model")
    if explicit_mesh() or hidden.dtype == jnp.float32:
        return jnp.matmul(hidden, whole, preferred_element_type=jnp.float32)
    return _f32_product(hidden, whole)


@jax.custom_vjp
def _f32_product(x: Float[Array, "*batch D"], weight: Float[Array, "D V"]) -> Float[Array, "*batch V"]:
    """A product in f32 whose gradient is multiplied in the dtype of the weight; autodiff would multiply f32 by bf16."""
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


def _f32_product_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _f32_product(x, weight), (x, weight)


def _f32_product_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weight = residuals
    narrow = cotangent.astype(weight.dtype)
    rows, columns = x.reshape(-1, x.shape[-1]), narrow.reshape(-1, narrow.shape[-1])
    d_weight = jnp.matmul(rows.T, columns, preferred_element_type=jnp.float32)
    return jnp.matmul(narrow, weight.T), d_weight.astype(weight.dtype)


_f32_product.defvjp(_f32_product_forward, _f32_product_backward)


def flatten_tokens(x: Float[Array, "B S D"]) -> Float[Array, "T D"]:
    """All positions as rows: XLA:CPU multiplies plain matrices, forward and backward, a quarter faster than batches."""
    return jnp.reshape(x, (-1, x.shape[-1]), out_sharding=out_sharding(BATCH_AXES, None))


def split_heads(tokens: Float[Array, "T Q"], like: Float[Array, "B S D"], features: int) -> Float[Array, "B S H E"]:
    """Rows of features as heads of each position of `like`, split over `model`."""
    shape, spec = (*like.shape[:2], -1, features), out_sharding(BATCH_AXES, None, "model", None)
    return jnp.reshape(tokens, shape, out_sharding=spec)


def merge_heads(context: Float[Array, "B S H E"]) -> Float[Array, "T Q"]:
    """The inverse of `split_heads`."""
    shape = (context.shape[0] * context.shape[1], -1)
    return jnp.reshape(context, shape, out_sharding=out_sharding(BATCH_AXES, "model"))


def project_back(
    tokens: Float[Array, "T features"], weight: Float[Array, "features D"], like: Float[Array, "B S D"]
) -> Float[Array, "B S D"]:
    """Back to the shape of the residual stream, with a weight that is split over `model` and `data`."""
    projected = jnp.matmul(tokens, unshard(weight, "model", None), out_sharding=out_sharding(BATCH_AXES, None))
    return jnp.reshape(projected, like.shape, out_sharding=out_sharding(BATCH_AXES, None, None))


class MLP(eqx.Module):
    """SwiGLU feed-forward layer.

    References:
        Shazeer 2020 (arXiv 2002.05202).
    """

    gate: Float[Array, "D F"] = eqx.field(metadata=weight("matrix", "data", "model"))
    up: Float[Array, "D F"] = eqx.field(metadata=weight("matrix", "data", "model"))
    down: Float[Array, "F D"] = eqx.field(metadata=weight("matrix", "model", "data"))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Transforms each position on its own."""
        tokens = flatten_tokens(x)
        gate, up = unshard(self.gate, None, "model"), unshard(self.up, None, "model")
        return project_back(jax.nn.silu(tokens @ gate) * (tokens @ up), self.down, x)


def through_layers[Layer: PyTree, Out: PyTree](
    apply: Callable[[Array, Layer], tuple[Array, Out]],
    x: Float[Array, "B S D"],
    layers: Layer,
    *,
    scan: bool,
    remat: RematName,
) -> tuple[Float[Array, "B S D"], Out]:
    """Applies one layer after the other.

    Args:
        apply: the residual stream and a layer to the next stream, and anything else.
        x: the residual stream.
        layers: of which each leaf has a leading axis of layers; states may be those that an earlier call returned.
        scan: one compiled layer in a loop, or all of them one by one.
        remat: what the backward pass recomputes.

    Returns:
        The last stream, and what else was returned, stacked over the layers; but a `LayerState` becomes a `PerLayer`,
        where the layers are applied one by one.
    """
    apply = _rematerialised(apply, remat)
    if scan:
        return jax.lax.scan(apply, x, layers)
    apply = jax.jit(apply)  # Traced and lowered once for all layers.
    outputs: list[Out] = []
    for layer in unstack(layers):
        x, output = apply(x, layer)
        outputs.append(output)
    return x, jax.tree.map(_join, *outputs, is_leaf=lambda node: isinstance(node, LayerState))


def _join(*of_layers: Array | LayerState) -> Array | PerLayer:
    states = tuple(own for own in of_layers if isinstance(own, LayerState))
    return PerLayer(states) if states else jnp.stack([own for own in of_layers if not isinstance(own, LayerState)])


def unstack[Layer: PyTree](layers: Layer) -> list[Layer]:
    """The layers one by one. `lax.split` is used because its transpose is a single concatenation."""
    leaves, treedef = jax.tree.flatten(layers, is_leaf=lambda node: isinstance(node, PerLayer))

    def cut(leaf: Array | PerLayer) -> Sequence[Array | LayerState]:
        if isinstance(leaf, PerLayer):
            return leaf.states
        return [piece[0] for piece in jax.lax.split(leaf, (1,) * leaf.shape[0], axis=0)]

    return [jax.tree.unflatten(treedef, own) for own in zip(*map(cut, leaves), strict=True)]


def _rematerialised[**P, T](apply: Callable[P, T], remat: RematName) -> Callable[P, T]:
    if remat == "none":
        return apply
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return eqx.filter_checkpoint(apply, policy=policy)


def resolve_scan(asked: ScanName, num_layers: int, backend: Backend | None = None) -> bool:
    """Resolves `scan_layers`, and notes the reason."""
    most = _MOST_UNROLLED_LAYERS[(backend or current_backend()).name]
    scan = num_layers > most if asked == "auto" else asked
    why = f"more than {most} layers take long to compile one by one" if scan else "run faster than scanned ones"
    note_choice("layers", "scanned" if scan else "unrolled", why if asked == "auto" else "asked for by the config")
    return scan


def resolve_remat(
    asked: RematName,
    *,
    tokens: int,
    shards: int,
    parameters: int,
    activations: Mapping[RematName, int],
    backend: Backend | None = None,
) -> RematName:
    """Resolves `remat`, and notes the reason: the least that, by an estimate, lets a step fit into the device.

    Args:
        asked: what the config says.
        tokens: of a batch, on one device.
        shards: devices over which parameters and optimizer state are split.
        parameters: numbers of the model.
        activations: bytes that the forward pass keeps of a token, by what is recomputed.
        backend: whose memory counts. Where it does not tell, nothing is recomputed.
    """
    backend = backend or current_backend()
    name, why = asked, "asked for by the config"
    if asked == "auto" and backend.memory is None:
        name, why = "none", "all activations are kept"
    elif asked == "auto" and backend.memory is not None:
        room = int(_USABLE_MEMORY * backend.memory) - _STATE_BYTES * parameters // shards
        need = {name: tokens * size for name, size in activations.items()}
        name, why = "full", f"to keep all activations would take {_gib(need['none'])} GiB, of {_gib(room)}"
        for less in ("dots", "none"):
            if need[less] <= room:
                name, why = less, f"{_gib(need[less])} GiB of activations, and {_gib(room)} GiB beside the state"
    note_choice("recomputed", name, why)
    return name


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
