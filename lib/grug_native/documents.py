"""Documents out of files and folders: `.txt` and other text, `.jsonl`, `.parquet`; and out of this interpreter.

Every document is non-empty text that UTF-8 can carry. What cannot be read is an error that names the file and the
place; nothing is repaired or left out.
"""

import ast
import json
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

_TEXT = (
    ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .css .csv .tsv .yaml .yml .toml .ini .cfg .log "
    ".py .pyi .c .h .cc .cpp .hpp .cu .java .kt .scala .go .rs .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .swift "
    ".sql .sh .hs .ml .m"
)
TEXT_SUFFIXES = frozenset(_TEXT.split())
"""Suffixes of files that are one document each."""

SUFFIXES = TEXT_SUFFIXES | {".jsonl", ".parquet"}

type Paths = str | Path | Sequence[str | Path]

# Tests, vendored wheels, and tables of characters: nothing that reads like code.
_STDLIB_SKIPPED = (
    "test tests idle_test idlelib lib2to3 site-packages dist-packages ensurepip turtledemo __pycache__ encodings "
    "pydoc_data _pyrepl"
)
_STDLIB_FILE_BYTES = 128 * 1024
"""Longer modules are left out, so that no single one dominates the corpus."""


def find_files(domain: str, paths: Paths, *, leave_out: Sequence[Path] = ()) -> list[Path]:
    """Lists the files of a domain: files as given, folders recursively by name, without hidden, unknown, empty ones.

    Args:
        domain: what the errors call it.
        paths: files and folders.
        leave_out: folders that are not looked into, where they lie in one of those.

    Raises:
        ValueError: if a path does not exist, a file's suffix is unknown, or there is nothing to read.
    """
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            root = path.resolve()
            skipped = [folder.resolve().relative_to(root) for folder in leave_out if root in folder.resolve().parents]
            inside = [
                file
                for file in sorted(path.rglob("*"))
                if suffix(file) in SUFFIXES
                and not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(path).parts)
                and not any(file.relative_to(path).is_relative_to(folder) for folder in skipped)
                and file.is_file()
                and file.stat().st_size > 0
            ]
            if not inside:
                raise ValueError(
                    f"{domain}: the folder {path} holds no file with text in it and a known suffix ({_known()})"
                )
            files += inside
        elif not path.exists():
            raise ValueError(f"{domain}: {path} does not exist")
        elif suffix(path) not in SUFFIXES:
            raise ValueError(f"{domain}: {path} has the suffix {path.suffix!r}, which is none of {_known()}")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"{domain}: no paths are given")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{domain}: {file} is empty")
    return files


def suffix(file: Path) -> str:
    """What kind of file it is: `A.TXT` is a `.txt`."""
    return file.suffix.lower()


def _known() -> str:
    return " ".join(sorted(SUFFIXES))


def read_documents(file: Path, text_key: str) -> Iterator[str]:
    """Yields a file's documents: the lines of a `.jsonl`, the rows of a `.parquet`, the whole of anything else.

    Rows whose text is empty are passed over.

    Raises:
        ValueError: names the file, and the line or row.
    """
    if suffix(file) == ".jsonl":
        documents = _read_jsonl(file, text_key)
    elif suffix(file) == ".parquet":
        documents = _read_parquet(file, text_key)
    else:
        documents = iter([(str(file), _decode(file.read_bytes(), str(file)).removeprefix("\ufeff"))])
    for place, text in documents:
        if not isinstance(text, str):
            raise ValueError(f"{place}: the field {text_key!r} is {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: character {error.start} is half of a surrogate pair, and no text") from error
        if text:
            yield text


def _decode(data: bytes, file: str, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{file}, line {line}: byte {data[error.start]:#04x} is not UTF-8 ({error.reason}); convert the file"
        ) from error


def _read_jsonl(file: Path, text_key: str) -> Iterator[tuple[str, object]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row: object = json.loads(_decode(line, str(file), number))
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON: {error}") from error
            if not isinstance(row, dict) or text_key not in row:
                found = sorted(map(str, cast(dict[str, object], row))) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{place}: there is no field {text_key!r}; found {found}. {_other_key(text_key)}")
            yield place, cast(dict[str, object], row)[text_key]


def _other_key(text_key: str) -> str:
    return f"Rename what holds the text to {text_key!r}; or, in Python, give its name: local_text_data(..., text_key=)"


def _read_parquet(file: Path, text_key: str) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a parquet file: {error}") from error
    with parquet:
        columns: list[str] = parquet.schema_arrow.names
        if text_key not in columns:
            raise ValueError(f"{file}: there is no column {text_key!r}; found {columns}. {_other_key(text_key)}")
        number = 0
        for batch in parquet.iter_batches(columns=[text_key]):
            for text in batch.column(0).to_pylist():
                yield f"{file}, row {number}", text
                number += 1


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
