import equinox as eqx
from haliax import Axis, NamedArray

class AttentionMask(eqx.Module):
    is_causal: bool = eqx.field(default=False, static=True)
    explicit_mask: NamedArray | None = None
    segment_ids: tuple[NamedArray, NamedArray] | None = None
    sliding_window: int | None = None

    def materialize(
        self, QPos: Axis, KPos: Axis, q_slice: slice | None = None, k_slice: slice | None = None
    ) -> NamedArray | None: ...

class AttentionConfig:
    @property
    def KVHeads(self) -> Axis: ...
    @property
    def HeadSize(self) -> Axis: ...
    @property
    def QHeadsPerGroup(self) -> Axis: ...
