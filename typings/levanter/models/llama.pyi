from dataclasses import dataclass, field

from haliax import Axis
from jax import Array
from levanter.layers.attention import AttentionConfig
from levanter.layers.rotary import DefaultRotaryEmbeddingsConfig, RotaryEmbeddingsConfig
from levanter.models.lm_model import LmHeadModel

@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    max_seq_len: int = 2048
    hidden_dim: int = 4096
    intermediate_dim: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    head_dim: int | None = None
    num_kv_heads: int = 32
    initializer_range: float = 0.02
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    gradient_checkpointing: bool | str = True
    scan_layers: bool = True
    reference_checkpoint: str = ""
    rope: RotaryEmbeddingsConfig = field(default_factory=DefaultRotaryEmbeddingsConfig)
    @property
    def Embed(self) -> Axis: ...
    @property
    def Layers(self) -> Axis: ...
    @property
    def Mlp(self) -> Axis: ...
    def attention_config(self) -> AttentionConfig: ...

class LlamaLMHeadModel(LmHeadModel):
    @classmethod
    def init(cls, Vocab: Axis, config: LlamaConfig, *, key: Array) -> LlamaLMHeadModel: ...
