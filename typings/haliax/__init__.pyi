from haliax.axis import Axis as Axis
from haliax.core import NamedArray as NamedArray
from haliax.core import named as named
from haliax.partitioning import set_mesh as set_mesh
