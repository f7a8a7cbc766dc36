"""Fields of a config, set by their dotted names on a command line."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from grug_native.parsing.check import read_value
from grug_native.parsing.named_types import shared_fields


def overridden(kind: type, raw: Mapping[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Sets fields of a config's sections by their dotted names.

    Args:
        kind: the class of the config.
        raw: the sections; they are left as they are.
        overrides: pairs of a name, as in `trainer.mesh.data`, and a value in YAML, as in `2` or `[1, 2]`;
            where a field is text, the value is taken as it is.

    Where another class of model is named, the fields that it does not have are left out. Of an optimizer that gives way
    to another, the schedule and the clipping stay: rates that were chosen for one are wrong for the next.

    Raises:
        ValueError: if what a name leads through is no section, or a value is no YAML.
    """
    changed = copy.deepcopy(dict(raw))
    for section in ("model", "optimizer"):
        for named in (value for name, value in overrides if name == f"{section}.type"):
            if isinstance(changed.get(section), dict):
                changed[section] = shared_fields(section, changed[section], named)
    for name, value in overrides:
        *parents, key = name.split(".")
        section = changed
        for depth, parent in enumerate(parents, start=1):
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise ValueError(f"--{name}: {'.'.join(parents[:depth])} is {section!r}, and has no fields")
        section[key] = read_value(kind, name, value)
    return changed
