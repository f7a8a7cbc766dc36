from typing import Literal

import equinox as eqx
from jax import Array
from jax.typing import DTypeLike

GrugAttentionImplementation = Literal[
    "reference", "xla_flash", "tpu_splash", "gpu_fa4_cute", "gpu_fa4_cute_sm100", "gpu_pallas_triton_flash"
]

class AttentionMask(eqx.Module):
    is_causal: bool = eqx.field(default=False, static=True)
    segment_ids: tuple[Array, Array] | None = None
    sliding_window: int | None = eqx.field(default=None, static=True)
    fa4_bounds: tuple[Array, Array] | None = None
    @classmethod
    def causal(cls, *, sliding_window: int | None = None) -> AttentionMask: ...
    def with_segment_ids(self, q_segment_ids: Array, kv_segment_ids: Array | None = None) -> AttentionMask: ...
    def with_sliding_window(self, sliding_window: int | None) -> AttentionMask: ...
    def with_fa4_bounds(self, lower_bounds: Array, valid: Array) -> AttentionMask: ...
    def materialize_mask(self, q_len: int, k_len: int) -> Array | None: ...

def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: AttentionMask | Array | None,
    *,
    implementation: GrugAttentionImplementation | None = None,
) -> Array: ...
def reference_attention(
    q: Array, k: Array, v: Array, mask: AttentionMask | Array | None, *, logits_dtype: DTypeLike | None
) -> Array: ...
