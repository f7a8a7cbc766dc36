from dataclasses import dataclass
from typing import Any

@dataclass
class Entry:
    name: str
    cfg: dict[str, Any] | None
    tags: set[str]
