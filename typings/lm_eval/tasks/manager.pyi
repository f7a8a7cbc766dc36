from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks._index import Entry

class TaskDict(TypedDict):
    tasks: dict[str, Task]
    groups: NotRequired[dict[str, Group]]
    group_map: NotRequired[dict[str, list[str]]]

class TaskManager:
    include_path: str | Path | list[str | Path] | None
    def __init__(
        self,
        verbosity: str | None = None,
        include_path: str | Path | list[str | Path] | None = None,
        include_defaults: bool = True,
        metadata: dict[str, dict[str, Any] | str] | None = None,
    ) -> None: ...
    @property
    def all_tasks(self) -> list[str]: ...
    @property
    def all_groups(self) -> list[str]: ...
    @property
    def all_subtasks(self) -> list[str]: ...
    @property
    def all_tags(self) -> list[str]: ...
    @property
    def task_index(self) -> dict[str, Entry]: ...
    def load(self, task_list: str | Sequence[str | dict[str, Any]]) -> TaskDict: ...
    def match_tasks(self, task_list: list[str]) -> list[str]: ...

def load_yaml(path: str | Path, *, resolve_func: bool = True, recursive: bool = True) -> dict[str, Any]: ...
