"""The reference of the config, made of its dataclasses: `python -m experiments.config_reference > docs/config.md`."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig
from grug_native.evaluation.config import GrugEvalConfig, GrugHarnessConfig
from grug_native.levanter_optimizer import LevanterOptimizer
from grug_native.model import GrugModelConfig
from grug_native.optimizer import AdamWConfig, GroupConfig, LionConfig, MuonConfig
from grug_native.rotary import GrugRopeConfig
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import MeshAxes
from grug_native.weights.config import InitFrom

LEVANTER_DATA = "https://github.com/marin-community/marin/blob/main/lib/levanter/docs/reference/Data-Formats.md"
"""Where levanter documents its data config."""

_TOP = f"""\
# Config reference

Made by `uv run python -m experiments.config_reference > docs/config.md`; a test compares the two.

A run's config has the sections below and `output_path`, the folder of the run. Each field can be set in YAML and on the
command line by its dotted name (`--trainer.seed 1`). A type in quotes is one of the words given; `None` is `null` in
YAML. A field without a default is required. A section that is given in part keeps the rest of its default.

## data

The section is levanter's `LmDataConfig`, with its fields and defaults: [the data formats of levanter]({LEVANTER_DATA}).
"""

_SECTIONS: tuple[tuple[str, type], ...] = (
    ("model", GrugModelConfig),
    ("model.rope", GrugRopeConfig),
    ("optimizer, type: adamw", AdamWConfig),
    ("optimizer, type: muon", MuonConfig),
    ("optimizer, type: lion", LionConfig),
    ("optimizer, type: levanter", LevanterOptimizer),
    ("optimizer.embedding, .head, .matrix, .norm", GroupConfig),
    ("optimizer.schedule", ScheduleConfig),
    ("trainer", GrugTrainerConfig),
    ("trainer.init_from", InitFrom),
    ("trainer.mesh", MeshAxes),
    ("eval", GrugEvalConfig),
    ("eval.harness", GrugHarnessConfig),
)


def reference() -> str:
    """The reference as Markdown."""
    documented = {kind for _, kind in _SECTIONS} | {GrugNativeRunConfig}
    return "\n".join([_TOP, *(line for name, kind in _SECTIONS for line in _section(name, kind, documented))])


def main() -> None:
    """Prints the reference."""
    print(reference(), end="")


def _section(name: str, kind: type, documented: set[type]) -> Iterator[str]:
    meanings = field_docstrings(kind)
    yield f"## {name}\n"
    yield f"`{kind.__name__}`: {(kind.__doc__ or '').strip().splitlines()[0]}\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    for item in fields(kind):
        cells = (f"`{item.name}`", f"`{_type(item.type)}`", _default(item, documented), meanings.get(item.name, ""))
        yield f"| {' | '.join(cell.replace('|', r'\|') for cell in cells)} |"
    yield ""


def field_docstrings(kind: type) -> dict[str, str]:
    """The text that stands under each field of a class, on one line; fields without one are left out."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
            case _:
                pass
    return found


def _type(kind: Any) -> str:
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(repr, members))
    if origin in (Union, UnionType):
        return " | ".join(map(_type, members))
    if members:
        return f"{origin.__name__}[{', '.join(map(_type, members))}]"
    return {NoneType: "None", Ellipsis: "..."}.get(kind) or kind.__name__


def _default(item: "Field[Any]", documented: set[type]) -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return "required"
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    if not is_dataclass(default) or isinstance(default, type):
        return f"`{default!r}`"
    assert type(default) in documented
    changed = [f for f in fields(default) if getattr(default, f.name) != f.default]
    own = ", ".join(f"{f.name}: {getattr(default, f.name)!r}" for f in changed)
    return f"`{{{own}}}`" if own else "its defaults"


if __name__ == "__main__":
    main()
