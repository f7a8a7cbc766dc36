"""Documents out of this interpreter: the sources of its library, their docstrings, and the language reference."""

import ast
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Tests, vendored wheels, and tables of characters: nothing that reads like code.
_STDLIB_SKIPPED = (
    "test tests idle_test idlelib lib2to3 site-packages dist-packages ensurepip turtledemo __pycache__ encodings "
    "pydoc_data _pyrepl"
)
_STDLIB_FILE_BYTES = 128 * 1024
"""Longer modules are left out, so that no single one dominates the corpus."""


def read_stdlib() -> dict[str, str]:
    """Returns the source text of this interpreter's library, by module file: `{"json/decoder.py": ...}`.

    Of files with the same text there is the first.

    Raises:
        ValueError: if this Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, str] = {}
    seen: set[str] = set()
    skipped = set(_STDLIB_SKIPPED.split())
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        generated = name.parts[0].startswith(("config-", "_sysconfigdata"))
        if generated or skipped.intersection(name.parts[:-1]) or file.stat().st_size > _STDLIB_FILE_BYTES:
            continue
        with tokenize.open(file) as source:
            text = source.read()
        if text and text not in seen:
            seen.add(text)
            modules[name.as_posix()] = text
    if not modules:
        raise ValueError(f"this Python has no library sources under {root}: use local_text_data with texts of your own")
    return modules


def docstrings(source: str) -> str:
    """Returns the docstrings of a module, its classes and its functions, in order, a blank line between them."""
    return "\n\n".join(_docstrings(ast.parse(source)))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def read_topics() -> dict[str, str]:
    """Returns the Python language reference as this interpreter carries it for `help()`: `{"lambda": ...}`."""
    from pydoc_data.topics import topics

    return dict(topics)
