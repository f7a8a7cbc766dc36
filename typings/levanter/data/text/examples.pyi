from dataclasses import dataclass

from haliax import Axis
from jax import Array
from levanter.grug.attention import AttentionMask as GrugAttentionMask
from levanter.models.lm_model import LmExample

@dataclass(frozen=True)
class GrugLmExample:
    tokens: Array
    loss_weight: Array
    attn_mask: GrugAttentionMask = ...
    @staticmethod
    def causal(
        tokens: Array,
        *,
        loss_weight: Array | None = None,
        ignore_id: int | None = None,
        eos_id: int | None = None,
        segment_ids: Array | None = None,
        sliding_window: int | None = None,
        block_cross_document_attention: bool = True,
    ) -> GrugLmExample: ...
    @staticmethod
    def from_prompt_and_completion(
        tokens: Array,
        prompt_length: int,
        *,
        ignore_id: int | None = None,
        all_causal: bool = True,
        sliding_window: int | None = None,
    ) -> GrugLmExample: ...
    @staticmethod
    def causal_loss_mask(seq_len: int, prompt_length: int | None = None) -> Array: ...

def grug_lm_example_from_named(example: LmExample) -> GrugLmExample: ...
def named_lm_example_from_grug(
    example: GrugLmExample, Pos: Axis, batch_axis: Axis | str | None = None
) -> LmExample: ...
