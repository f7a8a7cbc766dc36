from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import draccus
import numpy as np
from levanter.data._preprocessor import BatchProcessor
from levanter.tokenizers import MarinTokenizer

class LmDatasetFormatBase(draccus.PluginRegistry):
    @property
    def token_data_key(self) -> str: ...
    def build_preprocessor(
        self, tokenizer: MarinTokenizer, *, enforce_eos: bool = True, enforce_bos: bool = True
    ) -> BatchProcessor[Mapping[str, Any], dict[str, Any]]: ...

@dataclass(frozen=True)
class TextLmDatasetFormat(LmDatasetFormatBase):
    text_key: str = "text"

@dataclass(frozen=True)
class ChatLmDatasetFormat(LmDatasetFormatBase):
    messages_field: str = "messages"
    chat_template: str | None = None
    system_prompt: str | None = None
    chat_template_kwargs: str | None = "chat_template_kwargs"
    pack: bool | int | None = None
    mask_user_turns: bool = True
    slice_strategy: Literal["left", "right", "raise", "drop"] = "left"

@dataclass(frozen=True)
class PrebuiltLmDatasetFormat(LmDatasetFormatBase):
    input_ids_key: str = "input_ids"
    loss_weights_key: str | None = None
    loss_weight_transform: Callable[[np.ndarray], np.ndarray] | None = None

def preprocessor_for_format(
    format: LmDatasetFormatBase, tokenizer: MarinTokenizer, *, enforce_eos: bool = True, enforce_bos: bool = True
) -> BatchProcessor[Mapping[str, Any], dict[str, Any]]: ...
