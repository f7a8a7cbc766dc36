from contextlib import AbstractContextManager

from jax.sharding import AxisType, Mesh

def local_cpu_mesh(axis_type: AxisType = ...) -> AbstractContextManager[Mesh]: ...
