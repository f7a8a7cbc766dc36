from typing import Any

import equinox as eqx
from haliax import NamedArray
from jax import Array
from levanter.layers.attention import AttentionMask

class LmExample(eqx.Module):
    tokens: NamedArray
    loss_weight: NamedArray
    attn_mask: AttentionMask | NamedArray = ...

    @staticmethod
    def causal(
        tokens: NamedArray,
        *,
        loss_weight: NamedArray | None = None,
        ignore_id: int | None = None,
        eos_id: int | None = None,
        segment_ids: NamedArray | None = None,
        sliding_window: int | None = None,
        block_cross_document_attention: bool = True,
    ) -> "LmExample": ...

class LmHeadModel(eqx.Module):
    def __call__(
        self,
        input_ids: NamedArray,
        attn_mask: NamedArray | AttentionMask | None = None,
        pos_ids: NamedArray | None = None,
        *,
        key: Array | None = None,
    ) -> NamedArray: ...
    def compute_next_token_loss(
        self,
        example: LmExample,
        *,
        key: Array | None = None,
        reduction: Any = ...,
        reduction_axis: Any = None,
        logsumexp_weight: float | None = None,
        loss_dtype: Any = ...,
        logit_soft_cap: float | None = None,
    ) -> Array | NamedArray: ...
