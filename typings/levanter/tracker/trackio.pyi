from dataclasses import dataclass, field
from typing import Any

from levanter.tracker.tracker import Tracker, TrackerConfig

@dataclass
class TrackioConfig(TrackerConfig):
    project: str = "levanter"
    name: str | None = None
    space_id: str | None = None
    dataset_id: str | None = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    mode: str | None = None
    resume: str = "auto"
    background: bool = True
    background_max_queue_size: int = 10000
    background_finish_timeout: float = 120.0
    def init(self, run_id: str | None) -> Tracker: ...
