from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

@dataclass
class Entry:
    name: str
    cfg: dict[str, Any] | None
    tags: set[str]

class TaskIndex:
    @staticmethod
    def build(paths: Iterable[Path], *, resolve_includes: bool = True) -> dict[str, Entry]: ...
