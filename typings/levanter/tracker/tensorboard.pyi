from dataclasses import dataclass

from levanter.tracker.tracker import Tracker, TrackerConfig

@dataclass
class TensorboardConfig(TrackerConfig):
    logdir: str = "tblogs"
    comment: str | None = ""
    purge_step: int | None = None
    max_queue: int | None = 10
    flush_secs: int | None = 120
    filename_suffix: str | None = ""
    write_to_disk: bool | None = True
    def init(self, run_id: str | None) -> Tracker: ...
