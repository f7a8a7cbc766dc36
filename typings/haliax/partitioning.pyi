from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from haliax.axis import Axis
from jax.sharding import AbstractMesh, Mesh

type PhysicalAxisSpec = str | Sequence[str]
type ResourceMapping = Mapping[str, PhysicalAxisSpec]

def set_mesh(mesh: Mesh | AbstractMesh) -> AbstractContextManager[None]: ...
def physical_axis_name(axis: Axis | str, mapping: ResourceMapping | None = None) -> PhysicalAxisSpec | None: ...
def axis_mapping(mapping: ResourceMapping, *, merge: bool = False) -> AbstractContextManager[None]: ...
