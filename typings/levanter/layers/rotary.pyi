from dataclasses import dataclass

import draccus

@dataclass(frozen=True)
class RotaryEmbeddingsConfig(draccus.ChoiceRegistry):
    theta: float = 10000.0

@dataclass(frozen=True)
class DefaultRotaryEmbeddingsConfig(RotaryEmbeddingsConfig):
    factor: float = 1.0

@dataclass(frozen=True)
class Llama3RotaryEmbeddingsConfig(RotaryEmbeddingsConfig):
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
