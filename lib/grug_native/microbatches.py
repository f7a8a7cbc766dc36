"""Batches larger than memory: the gradient of a whole batch, added up over parts of it inside of one step."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, get_abstract_mesh
from jaxtyping import Array

from grug_native.kernels.backend import Backend, current_backend
from grug_native.kernels.choices import note_choice
from grug_native.language_model import Aux, LanguageModel, cast_parameters, map_weights
from grug_native.layers import RMSNorm
from grug_native.loss import ComputeDtype, Part
from grug_native.sharding import BATCH_AXES, batch_shards, explicit_mesh, gather, gather_whole, sum_over_batch
from grug_native.types import LmBatch, Scalar

type PartLoss = Callable[..., tuple[Scalar, Aux]]
"""`loss(params, batch)` of a whole batch; `loss(params, microbatch, part)`, its share of the loss of a batch."""

_WHOLE_MODEL_SHARE = 0.3
"""Of a device's memory, that a copy of the model and its gradient may take so that the devices add up once a step."""


def batch_gradients(
    loss: PartLoss, params: LanguageModel, batch: LmBatch, *, microbatch_size: int | None, compute_dtype: ComputeDtype
) -> tuple[Scalar, Aux, LanguageModel]:
    """The loss of a batch, what the model says beside it, and the gradients, in f32.

    Those of the whole batch, whatever the size of its parts, but for rounding; of a model's own losses and metrics, the
    mean over the parts, which is the whole batch's where they are means over tokens.

    Args:
        loss: sums to the loss of the batch over its parts.
        params: the parameters, in f32.
        batch: B sequences.
        microbatch_size: sequences of a part, over all devices; None: the batch in one pass.
        compute_dtype: of the copy of the parameters that the parts share.

    Raises:
        ValueError: if the parts do not divide the batch.
    """
    sequences = batch.tokens.shape[0]
    if microbatch_size is None or microbatch_size == sequences:
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return value, aux, grads
    check_microbatch_size(microbatch_size, sequences, batch_shards())
    count = sequences // microbatch_size
    part = Part(jnp.sum(batch.loss_weight), count)
    once = reduce_once(params, compute_dtype)
    shared = cast_parameters(params, compute_dtype)
    shared = _gather_model(shared) if once else shared

    def add(total: LanguageModel, microbatch: LmBatch) -> tuple[LanguageModel, tuple[Scalar, Aux]]:
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(shared, microbatch, part)
        total = jax.tree.map(lambda total, own: total + own.astype(jnp.float32), total, grads)
        return total, (value, Aux(aux.losses, aux.metrics))

    total, (values, aux) = jax.lax.scan(add, jax.tree.map(_no_gradient, shared), split_batch(batch, count))
    grads = jax.tree.map(lambda total, leaf: sum_over_batch(total, like=leaf), total, params) if once else total
    return jnp.sum(values), jax.tree.map(lambda x: jnp.mean(x, axis=0), aux), grads


def check_microbatch_size(size: int, sequences: int, shards: int = 1) -> None:
    """Refuses parts that do not divide a batch, or do not divide over the devices: a `ValueError` names both."""
    if size <= 0 or sequences % size != 0:
        raise ValueError(
            f"trainer.microbatch_size={size} does not divide a batch of {sequences} sequences: choose a divisor"
        )
    if size % shards != 0:
        raise ValueError(
            f"trainer.microbatch_size={size} does not divide over {shards} data-parallel device(s): it counts the "
            f"sequences of all of them, so choose a multiple of {shards}"
        )


def split_batch[Batch: LmBatch](batch: Batch, count: int) -> Batch:
    """So many parts, stacked; each device has as many sequences of each part, and none moves between devices."""

    def split(x: Array) -> Array:
        rest = (None for _ in x.shape[1:])
        spec = PartitionSpec(BATCH_AXES, None, *rest) if explicit_mesh() else None
        return jnp.swapaxes(jnp.reshape(x, (-1, count, *x.shape[1:]), out_sharding=spec), 0, 1)

    return jax.tree.map(split, batch)


def reduce_once(params: LanguageModel, compute_dtype: ComputeDtype, backend: Backend | None = None) -> bool:
    """Whether the devices add up their gradients once a step: each then has a copy of the model and of its gradient.

    Where there is no room for these, they are gathered and added up for each microbatch.
    """
    mesh, backend = get_abstract_mesh(), backend or current_backend()
    if batch_shards() == 1:
        return False
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params)) // mesh.shape["model"]
    need = numbers * (4 + jnp.dtype(compute_dtype).itemsize)
    fits = backend.memory is None or need <= _WHOLE_MODEL_SHARE * backend.memory
    why = f"a copy of the model and its gradient take {need / 2**30:.1f} GiB a device"
    note_choice("gradients", "added up over devices once a step" if fits else "added up for each microbatch", why)
    return fits


def _gather_model(params: LanguageModel) -> LanguageModel:
    def is_norm(node: object) -> bool:
        return isinstance(node, RMSNorm)

    gathered = map_weights(gather, params)
    return jax.tree.map(
        lambda node: eqx.tree_at(lambda norm: norm.weight, node, replace_fn=gather_whole) if is_norm(node) else node,
        gathered,
        is_leaf=is_norm,
    )


def _no_gradient(weight: Array) -> Any:
    """Zeros of the type of a weight's gradient: of one that each device has whole, each device's part of the sum."""
    if not explicit_mesh():
        return jnp.zeros(weight.shape, jnp.float32)
    spec = jax.typeof(weight).sharding.spec
    sharding = NamedSharding(get_abstract_mesh(), PartitionSpec(*spec.partitions, unreduced=spec.reduced))
    return jax.lax.full(weight.shape, 0, jnp.float32, sharding=sharding)
