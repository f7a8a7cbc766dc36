from typing import Any, Required, TypedDict

class EvalResults(TypedDict, total=False):
    results: Required[dict[str, dict[str, Any]]]
    groups: dict[str, dict[str, Any]]
    group_subtasks: dict[str, list[str]]
    configs: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    higher_is_better: dict[str, dict[str, bool | None]]
    samples: dict[str, list[dict[str, Any]]]
