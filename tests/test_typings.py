"""The hand-written stubs say nothing that the installed libraries do not."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STUBS = Path(__file__).parent.parent / "typings"


def modules() -> list[str]:
    paths = (path.relative_to(STUBS).with_suffix("") for path in STUBS.rglob("*.pyi") if path.read_text().strip())
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def named(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Classes, functions and fields of a stub; its own private helpers stand for unnamed types."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def differences(where: str, body: list[ast.stmt], real: Any) -> Iterator[str]:
    for name, node in named(body):
        # A field may be set in __init__ only, and a type need not have its field at run time.
        if name == "__getattr__" or (isinstance(node, ast.AnnAssign) and inspect.isclass(real)):
            continue
        if isinstance(node, ast.ClassDef) and name.startswith("_"):
            continue
        found = inspect.getattr_static(real, name, None)
        if found is None and not hasattr(real, name):
            yield f"{where}.{name} does not exist"
        elif isinstance(node, ast.ClassDef):
            yield from differences(f"{where}.{name}", node.body, getattr(real, name))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = found.__func__ if isinstance(found, staticmethod | classmethod) else found
            if not inspect.isfunction(function):  # a cached property, or something that is not Python
                continue
            known = inspect.signature(function).parameters
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
                continue
            unknown = [parameter for parameter in parameters(node) if parameter not in known]
            asked = [p.name for p in known.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
            missing = [parameter for parameter in asked if parameter not in parameters(node)]
            if unknown or missing:
                yield f"{where}.{name}: unknown parameters {unknown}, missing ones {missing}"


@pytest.mark.parametrize("module", modules())
def test_stub_agrees_with_the_library(module: str) -> None:
    path = STUBS.joinpath(*module.split("."))
    file = path / "__init__.pyi" if path.is_dir() else path.with_suffix(".pyi")
    tree = ast.parse(file.read_text())
    assert list(differences(module, tree.body, importlib.import_module(module))) == []
