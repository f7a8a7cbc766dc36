from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

@dataclass
class ScheduleStep(Generic[T]):
    start: int
    value: T

IntSchedule = list[ScheduleStep[int]]

@dataclass
class BatchSegment:
    start: int
    until: int
    value: int
    offset: int

class BatchSchedule:
    schedule: int | IntSchedule
    segments: list[BatchSegment]
    def __init__(self, schedule: int | IntSchedule) -> None: ...
    def batch_size_at_step(self, step: int) -> int: ...
    def global_data_offset_by_step(self, step: int) -> int: ...
    def find_step_containing_offset(self, offset: int) -> int: ...
    def batch_indices_at_step(self, bn: int) -> range: ...
    def unique_batch_sizes(self) -> set[int]: ...
