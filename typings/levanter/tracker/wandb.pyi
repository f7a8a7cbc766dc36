from dataclasses import dataclass, field

from levanter.tracker.tracker import Tracker, TrackerConfig

def _teardown_wandb_service_bounded(timeout: float) -> None: ...

@dataclass
class WandbConfig(TrackerConfig):
    entity: str | None = None
    project: str | None = "levanter"
    name: str | None = None
    tags: list[str] = field(default_factory=list[str])
    id: str | None = None
    group: str | None = None
    mode: str | None = None
    resume: bool | str | None = "allow"
    fork_from: str | None = None
    save_code: bool | str = True
    replicate_path: str | None = None
    background: bool = True
    background_max_queue_size: int = 10000
    background_finish_timeout: float = 120.0
    service_teardown_timeout: float = 60.0
    def init(self, run_id: str | None) -> Tracker: ...
