"""The shape of the project: who may import whom, where things stand, how long a file gets, and what is documented."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lib" / "grug_native"
MODULES = sorted(PACKAGE.glob("*.py"))
DOCUMENTED = [*MODULES, *sorted((ROOT / "experiments").rglob("*.py"))]

LONGEST = 350
"""Lines of a file of the library, unless the docstring at its top says why it is longer."""

DESIGNED = (
    "types mesh model loss optimizer state train metrics data corpus tracker checkpoint eval_hooks eval_harness config "
    "runner launch cli"
)
"""Modules that the design names, each for what it says there."""

TESTED_WITH = {
    "__init__": "readme",
    "checkpoint_commands": "cli",
    "cli_errors": "cli",
    "commands": "cli",
    "config_check": "config",
    "config_types": "config",
    "corpus_store": "corpus",
    "eval_config": "config",
    "job": "results",
    "loop": "runner",
    "mixture": "data",
    "data_record": "checkpoint_metadata",
    "python_texts": "corpus",
    "resume": "plan",
    "run_plan": "plan",
    "shell": "cli",
    "text_files": "documents",
    "text_survey": "corpus",
}
"""Modules which have no test file of their own, since they are one thing with another to whoever calls them."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def test_imports_keep_to_the_contracts() -> None:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [lint_imports, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_layout_is_the_designed_one() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(name) for name in listed.stdout.splitlines()]
    top = {file.parts[0] for file in files if not file.parts[0].startswith(".")}
    assert top == {"lib", "experiments", "tests", "typings", "docs", "pyproject.toml", "README.md", "LICENSE"}
    # The library is one flat package.
    assert {file.parent for file in files if file.parts[0] == "lib"} == {Path("lib/grug_native")}
    names = {module.stem for module in MODULES}
    assert set(DESIGNED.split()) <= names
    tests = {file.stem.removeprefix("test_") for file in (ROOT / "tests").rglob("test_*.py")}
    assert {TESTED_WITH.get(name, name) for name in names} <= tests
    assert not tests & set(TESTED_WITH)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_files_are_short(module: Path) -> None:
    source = module.read_text()
    length = len(source.splitlines())
    if length > LONGEST:
        docstring = ast.get_docstring(ast.parse(source)) or ""
        assert f"over {LONGEST} lines" in docstring, f"{module.name} has {length} lines, and no reason at its top"


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert path.stem in ("__init__", "notebook_tour") or ast.get_docstring(tree), "the module says nothing of itself"
    assert list(undocumented(tree.body, "")) == []


def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Public classes, functions and methods without a docstring."""
    for node in body:
        if isinstance(node, Definition):
            name = prefix + node.name
            if node.name.startswith("_") or overridden(node):
                continue
            if ast.get_docstring(node) is None:
                yield name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{name}.")


def overridden(node: Definition) -> bool:
    """Whether a method is documented where it was declared first."""
    return any(isinstance(decorator, ast.Name) and decorator.id == "override" for decorator in node.decorator_list)
