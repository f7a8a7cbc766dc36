from dataclasses import dataclass

@dataclass(frozen=True)
class Axis:
    name: str
    size: int
    def alias(self, new_name: str) -> Axis: ...
    def resize(self, size: int) -> Axis: ...
