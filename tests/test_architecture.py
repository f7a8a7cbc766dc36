"""The shape of the project: who may import whom, where things stand, how long a file gets, and what is documented."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lib" / "grug_native"
MODULES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTED = [*MODULES, *sorted((ROOT / "experiments").rglob("*.py"))]

LONGEST = 350
"""Lines of a file of the library, unless the docstring at its top says why it is longer."""

TESTED_WITH = {
    "bucket_committing": "bucket_checkpointer",
    "bucket_errors": "bucket_store",
    "bucket_owner": "bucket_run_writer",
    "bucket_place": "bucket_checkpointer",
    "bucket_processes": "bucket_checkpointer",
    "bucket_reading": "bucket_checkpointer",
    "bucket_reports": "evaluation_harness_reports",
    "bucket_run_files": "bucket_checkpointer",
    "bucket_save_queue": "bucket_checkpointer",
    "checkpoint_record": "checkpoint_metadata",
    "checkpoint_schedule": "checkpoint_checkpointer",
    "checkpoint_source": "checkpoint_orbax_io",
    "cli_ckpt": "cli_main",
    "cli_commands": "cli_main",
    "data_corpus_making": "data_corpus",
    "data_corpus_store": "data_corpus",
    "data_mixture": "data_loader",
    "data_python_texts": "data_corpus",
    "data_record": "checkpoint_metadata",
    "data_sketch": "plan",
    "data_text_files": "data_documents",
    "data_text_survey": "data_corpus",
    "data_vocabulary": "data_cache",
    "data_vocabulary_check": "data_loader",
    "eval_hooks": "evaluation_perplexity",
    "evaluation_config": "config",
    "host_shell": "cli_main",
    "launch_exit_codes": "cli_main",
    "launch_job": "launch_summary",
    "launch_text_domains": "launch_text_run",
    "loop": "runner",
    "parsing_check": "config",
    "parsing_named_types": "config",
    "parsing_overrides": "config",
    "resume": "plan",
    "run_plan": "plan",
    "step_log": "runner",
    "weights_config": "weights_init_from",
    "weights_hf_export": "export",
    "weights_hf_tensors": "export",
    "weights_sources": "weights_init_from",
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
    modules = {"_".join(module.relative_to(PACKAGE).with_suffix("").parts) for module in MODULES}
    names = {name for name in modules if not name.endswith("__init__")}
    tests = {name for file in (ROOT / "tests").rglob("test_*.py") for name in names_of_test(file)}
    assert {TESTED_WITH.get(name, name) for name in names} <= tests
    assert not tests & set(TESTED_WITH)


def names_of_test(file: Path) -> set[str]:
    """The modules that a file tests; in `tests/bucket/`, those of the room `bucket/`."""
    name = file.stem.removeprefix("test_")
    room = file.parent.name
    return {name, f"{room}_{name}"} if (PACKAGE / room).is_dir() else {name}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
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
    """Whether a method is documented where it was declared first, or where its overloads are implemented."""
    names = {decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)}
    return not names.isdisjoint({"override", "overload"})
