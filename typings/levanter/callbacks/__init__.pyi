from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from levanter.data.mixture import MixtureDataset
from levanter.schedule import BatchSchedule

S = TypeVar("S")

@dataclass
class StepInfo(Generic[S]):
    state: S
    loss: float
    step_duration: float
    @property
    def model(self) -> Any: ...
    @property
    def eval_model(self) -> Any: ...
    @property
    def opt_state(self) -> Any: ...
    @property
    def step(self) -> int: ...
    @property
    def next_step(self) -> int: ...

def mixture_weight_logging_hook(
    batch_schedule: BatchSchedule, train_dataset: MixtureDataset[Any]
) -> Callable[[StepInfo[Any]], None]: ...
