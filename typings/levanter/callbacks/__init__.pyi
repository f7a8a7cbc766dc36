from collections.abc import Callable
from typing import Any

from levanter.data.mixture import MixtureDataset
from levanter.schedule import BatchSchedule

def mixture_weight_logging_hook(
    batch_schedule: BatchSchedule, train_dataset: MixtureDataset[Any]
) -> Callable[[Any], None]: ...
