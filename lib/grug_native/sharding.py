"""Device meshes with explicit axes, and the few sharding helpers which the model needs.

Four axes: `replica_dcn` (whole replicas, one per slice), `data` (batch, and the parameters: FSDP), `expert` (batch, and
the experts of a mixture) and `model` (tensor parallelism). Axes of size 1 stay in the mesh, so that a `PartitionSpec`
can always name them.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh
from jaxtyping import Array

from grug_native.types import Device

type AxisName = str | tuple[str, ...] | None
"""Mesh axes over which one axis of an array is split."""

BATCH_AXES = ("replica_dcn", "data", "expert")
"""The mesh axes over which the batch is split."""

AXIS_NAMES = ("replica_dcn", "data", "expert", "model")


@dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """Sizes of the mesh axes, in devices. At most one may be -1: it takes what the others leave."""

    replica_dcn: int = 1
    """Whole replicas of the parameters, usually one per slice or data centre."""
    data: int = -1
    """Data parallelism; the parameters and the optimizer state are split over this axis too (FSDP)."""
    expert: int = 1
    """Expert parallelism: of a mixture of experts, each device has some of them; the batch is split over it too."""
    model: int = 1
    """Tensor parallelism: heads, MLP features and vocabulary are split over this axis."""

    def resolve(self, num_devices: int) -> tuple[int, int, int, int]:
        """Returns the sizes of `(replica_dcn, data, expert, model)` for `num_devices` devices.

        Raises:
            ValueError: if the sizes do not multiply to the number of devices.
        """
        sizes = (self.replica_dcn, self.data, self.expert, self.model)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh axes must be positive, at most one of them -1; got {self}")
        fixed = int(np.prod([size for size in sizes if size != -1]))
        if num_devices % fixed != 0 or (-1 not in sizes and fixed != num_devices):
            raise ValueError(
                f"a mesh of replica_dcn={self.replica_dcn}, data={self.data}, expert={self.expert}, model={self.model} "
                f"does not fit {num_devices} device(s): the sizes must multiply to that; set one of them to -1 to let "
                "it fill up"
            )
        replica_dcn, data, expert, model = (num_devices // fixed if size == -1 else size for size in sizes)
        return replica_dcn, data, expert, model


def use_cpu_devices(count: int) -> None:
    """Splits the CPU into so many devices; call it before anything touches a device.

    In a collective each device blocks a thread of XLA's pool, which has one per core or device: a fetch of the next
    batch then finds none and all wait for ever. So the pool is made larger too, by the variable that XLA reads.
    """
    jax.config.update("jax_num_cpu_devices", count)
    if count > 1:
        os.environ.setdefault("NPROC", str(4 * count))


def create_mesh(
    global_batch_size: int | Sequence[int],
    axes: MeshAxes = MeshAxes(),
    *,
    devices: Sequence[Device] | None = None,
) -> Mesh:
    """Makes the explicit-axis mesh of a run.

    Args:
        global_batch_size: sequences per step over all devices; all sizes, when the batch size is scheduled.
        axes: sizes of the axes.
        devices: defaults to all devices of all processes.

    Raises:
        ValueError: if the axes do not fit the devices, or a batch size does not divide over the data-parallel devices.
    """
    chosen = list(jax.devices() if devices is None else devices)
    shape = axes.resolve(len(chosen))
    shards = shape[0] * shape[1] * shape[2]
    for size in (global_batch_size,) if isinstance(global_batch_size, int) else global_batch_size:
        if size <= 0 or size % shards != 0:
            below, above = size // shards * shards, (max(size, 0) // shards + 1) * shards
            nearest = f"{below} or {above}" if below > 0 else f"{above}"
            raise ValueError(
                f"train_batch_size={size} does not divide over {shards} data-parallel device(s) "
                f"(replica_dcn={shape[0]} x data={shape[1]} x expert={shape[2]} of {len(chosen)} devices): "
                f"use {nearest}"
            )
    return Mesh(_arrange(chosen, shape), AXIS_NAMES, axis_types=(AxisType.Explicit,) * len(AXIS_NAMES))


def _arrange(devices: list[Device], shape: tuple[int, int, int, int]) -> np.ndarray:
    """Makes neighbours on a TPU's torus neighbours on the mesh, and slices replicas; elsewhere keeps the order."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices != 0:
        return np.array(devices).reshape(shape)
    of_slice = (shape[0] // slices, *shape[1:])
    return create_hybrid_device_mesh(of_slice, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)


def batch_shards(mesh: Mesh | AbstractMesh | None = None) -> int:
    """Over how many devices the batch is split, by default on the ambient mesh."""
    mesh = get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def state_shards() -> int:
    """Over how many devices of the ambient mesh parameters and optimizer state are split."""
    mesh = get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["model"]


def check_divides(name: str, size: int, axis: str) -> None:
    """Refuses a size that does not divide over an axis of the ambient mesh: a `ValueError` names both."""
    mesh = get_abstract_mesh()
    if not mesh.empty and size % mesh.shape[axis] != 0:
        raise ValueError(
            f"{name}={size} does not divide over the {mesh.shape[axis]} devices of the mesh axis {axis!r}: choose a "
            f"multiple, or another trainer.mesh.{axis}"
        )


def explicit_mesh() -> bool:
    """Whether the ambient mesh has explicit axes, so that operations want output shardings."""
    mesh = get_abstract_mesh()
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def out_sharding(*spec: str | tuple[str, ...] | None) -> PartitionSpec | None:
    """The spec as an `out_sharding=` argument under an explicit mesh, None elsewhere."""
    return PartitionSpec(*spec) if explicit_mesh() else None


def reshard(x: Array, *spec: str | tuple[str, ...] | None) -> Array:
    """Lays `x` out as `spec` says under an explicit mesh; elsewhere returns it as it is."""
    return jax.sharding.reshard(x, PartitionSpec(*spec)) if explicit_mesh() else x


def unshard(weight: Array, *spec: str | None) -> Array:
    """Makes a weight whole over the batch axes that `spec` does not name, and lays it out so: the all-gather of FSDP.

    Its gradient is reduce-scattered. That has to be spelled out: the gradient of a plain `reshard` is summed whole on
    every device, twice the bytes, and all but a slice of it dropped. The result is `reduced` over the batch axes, the
    type whose cotangent JAX leaves as each device's part of the sum.

    Raises:
        ValueError: if the weight lies on a mesh, and that is not the ambient one.

    References:
        Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), stage 3.
    """
    if not explicit_mesh():
        if AxisType.Explicit in jax.typeof(weight).sharding.mesh.axis_types:
            raise ValueError(
                "the parameters lie on a mesh, and none is set: use them under `with jax.set_mesh(runner.mesh):`"
            )
        return weight
    home = jax.typeof(weight).sharding.spec
    if home.reduced:
        return jax.sharding.reshard(weight, PartitionSpec(*spec, reduced=home.reduced))
    if "data" not in home or get_abstract_mesh().shape["data"] == 1:
        return reshard(weight, *spec)
    return _unshard(PartitionSpec(*spec), home, weight)


def _reduced_axes(spec: PartitionSpec) -> frozenset[str]:
    return frozenset(axis for axis in BATCH_AXES if axis not in spec)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unshard(spec: PartitionSpec, home: PartitionSpec, weight: Array) -> Array:
    return jax.sharding.reshard(weight, PartitionSpec(*spec, reduced=_reduced_axes(spec)))


def _unshard_forward(spec: PartitionSpec, home: PartitionSpec, weight: Array) -> tuple[Array, None]:
    return _unshard(spec, home, weight), None


def _unshard_backward(spec: PartitionSpec, home: PartitionSpec, residuals: None, parts: Array) -> tuple[Array]:
    return (_sum_parts(parts, home),)


def _sum_parts(parts: Array, home: PartitionSpec) -> Array:
    spec = jax.typeof(parts).sharding.spec
    dimension = home.index("data")

    def scatter(part: Array) -> Array:
        own = jax.lax.psum_scatter(part, "data", scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(own, tuple(sorted(spec.unreduced - {"data"})))

    axes = spec.partitions
    scattered = PartitionSpec(*axes[:dimension], "data", *axes[dimension + 1 :])
    return jax.sharding.reshard(jax.shard_map(scatter, in_specs=spec, out_specs=scattered)(parts), home)


_unshard.defvjp(_unshard_forward, _unshard_backward)


def gather(weight: Array, *axes: AxisName) -> Array:
    """Makes a weight whole over the batch axes ahead of `unshard`, for several passes with one all-gather.

    Its gradient is then each device's part of a sum; add those of all passes up, and give the total to
    `sum_over_batch`.

    Args:
        weight: as its field lays it out. One that is not split over `data` is returned as it is: models use it without
            `unshard`, in ways of their own.
        *axes: mesh axes of its axes.
    """
    if "data" not in axes:
        return weight
    return gather_whole(weight, *(None if axis == "data" else axis for axis in axes))


def gather_whole(weight: Array, *spec: AxisName) -> Array:
    """Lays a weight out as `spec` says, its gradient left in parts. Only products and lookups take such a weight."""
    laid_out = PartitionSpec(*spec)
    return jax.sharding.reshard(weight, PartitionSpec(*spec, reduced=_reduced_axes(laid_out)))


def is_gathered(weight: Array) -> bool:
    """Whether a weight's gradient is left in parts."""
    return bool(jax.typeof(weight).sharding.spec.reduced)


def sum_over_batch(gradient: Array, *, like: Array) -> Array:
    """Adds up the devices' parts of a weight's gradient, and lays the sum out as the weight.

    One reduce-scatter, or, of a weight that is not split over `data`, one all-reduce.
    """
    home = jax.typeof(like).sharding.spec
    if not jax.typeof(gradient).sharding.spec.unreduced:
        return gradient
    return _sum_parts(gradient, home) if "data" in home else jax.sharding.reshard(gradient, home)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(array: np.ndarray, mesh: Mesh) -> Array:
    """Splits an array over the batch axes. Each process has all of it, and gives its devices their parts."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])
