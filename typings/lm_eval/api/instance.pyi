from dataclasses import dataclass, field
from typing import Any, Literal

OutputType = Literal["loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice"]

@dataclass
class Instance:
    request_type: OutputType
    doc: dict[str, Any]
    arguments: tuple[Any, ...]
    idx: int
    metadata: tuple[str | None, int | None, int | None] = field(
        default_factory=tuple[str | None, int | None, int | None]
    )
    resps: list[Any] = field(default_factory=list[Any])
    filtered_resps: dict[str, Any] = field(default_factory=dict[str, Any])
    task_name: str | None = None
    doc_id: int | None = None
    repeats: int | None = None
    # (context, continuation), (text,) or (context, generation settings), by request_type.
    @property
    def args(self) -> Any: ...
