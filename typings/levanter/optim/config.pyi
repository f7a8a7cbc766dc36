import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import draccus
import optax

@dataclass(frozen=True)
class OptimizerConfig(draccus.PluginRegistry, abc.ABC):
    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    min_lr_ratio: float = 0.1
    warmup: int | float = 0.01
    decay: int | float | None = None
    rewarmup: int | float = 0.0
    cycle_length: int | float | None | list[int] = None
    cycles: int | list[int] | None = None
    lr_schedule: str = "cosine"
    weight_decay_modules: list[str] | str | None = None
    default_weight_decay_mask: bool | None = None
    def build_weight_decay_mask(self) -> Callable[[Any], Any] | None: ...
    @abc.abstractmethod
    def build(self, num_train_steps: int) -> optax.GradientTransformation: ...
    def lr_scheduler(self, num_train_steps: int, override_lr: float | None = None) -> optax.Schedule: ...

@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    nesterov: bool = False
    def build(self, num_train_steps: int) -> optax.GradientTransformation: ...
