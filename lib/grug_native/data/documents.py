"""Documents out of files: `.txt` and other text, `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, compressed or not.

Every document is non-empty text that UTF-8 can carry; text in UTF-16 or UTF-32 is known by its byte order mark. What
cannot be read is an error that names the file and the place; nothing is repaired.
"""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from grug_native.data.text_files import (
    SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    FoundFiles,
    Paths,
    compression,
    known_suffixes,
    suffix,
    walk,
)

_PARQUET_ROWS = 1024
"""Read at a time: not so many that Ctrl-C has to wait for them."""
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""
_JSON_NAMES: Mapping[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}

type _Rows = Iterator[tuple[str, object]]
"""Pairs of a place, as in `file, line 3`, and what should be text, or None."""


def find_files(domain: str, paths: Paths, *, leave_out: Sequence[Path] = (), text_key: str = "text") -> FoundFiles:
    """Lists the files of a domain: files as given, and those of folders, recursively and through links, by name.

    A `.json`, `.csv` or `.tsv` of a folder is left out if it has no field, or column, of text: such files are settings
    and numbers more often than text.

    Args:
        domain: what the errors call it.
        paths: files and folders.
        leave_out: folders that are not looked into, where they lie in one of those.
        text_key: field or column of the text.

    Raises:
        ValueError: if a path does not exist, a file's suffix is unknown, or there is nothing to read.
    """
    found = FoundFiles([])
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            before = len(found.files)
            for file, reason in walk(path, leave_out=leave_out):
                if reason is None and suffix(file) in TABLE_SUFFIXES:
                    reason = _no_text(file, text_key)
                if reason is None:
                    found.files.append(file)
                else:
                    found.left_out.setdefault(reason, []).append(str(file.relative_to(path)))
            if len(found.files) == before:
                left_out = found.describe_left_out()
                raise ValueError(
                    f"{domain}: the folder {path} holds no file with text in it and a known suffix "
                    f"({known_suffixes()}){f'; left out: {left_out}' if left_out else ''}"
                )
        elif not path.exists():
            raise ValueError(f"{domain}: {path} does not exist")
        elif suffix(path) not in SUFFIXES:
            raise ValueError(f"{domain}: {path} has the suffix {path.suffix!r}, which is none of {known_suffixes()}")
        elif path.stat().st_size == 0:
            raise ValueError(f"{domain}: {path} is empty")
        else:
            found.files.append(path)
    if not found.files:
        raise ValueError(f"{domain}: no paths are given")
    return found


def _no_text(file: Path, text_key: str) -> str | None:
    """Why a table of a folder is left out: its first row has no text."""
    try:
        next(_rows(file, text_key), None)
    except _NoFieldError:
        return f"no field {text_key!r}; --text_key names another"
    except ValueError:
        if suffix(file) != ".json":
            raise
        return "no JSON"  # Settings are often of a dialect of it.
    return None


class _NoFieldError(ValueError):
    """A row has no field of the name that was asked for."""


def read_documents(file: Path, text_key: str) -> Iterator[str]:
    """Yields a file's documents: the rows of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, the whole of any other.

    Rows whose text is empty or null are passed over.

    Raises:
        ValueError: names the file, and the line or row.
    """
    return (text for text in read_rows(file, text_key) if text)


def read_rows(file: Path, text_key: str) -> Iterator[str | None]:
    """Yields what a file's rows hold: text, "" where it is empty, None where it is null.

    Raises:
        ValueError: names the file, and the line or row.
    """
    for place, text in _rows(file, text_key):
        if text is None:
            yield None
            continue
        if not isinstance(text, str):
            kind = _JSON_NAMES.get(type(text), type(text).__name__)
            raise ValueError(f"{place}: the field {text_key!r} is {kind}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: character {error.start} is half of a surrogate pair, and no text") from error
        yield text


def _rows(file: Path, text_key: str) -> _Rows:
    """Reads any kind of file, and says how far that went where the disk or a decompressor fails."""
    import pyarrow as pa

    kind, last = suffix(file), ""
    try:
        if kind == ".parquet":
            rows = _read_parquet(file, text_key)
        elif kind in TEXT_SUFFIXES:
            rows = iter([(str(file), _whole_text(file))])
        else:
            readers = {".jsonl": _read_jsonl, ".json": _read_json}
            rows = readers.get(kind, _read_table)(file, text_key)
        for place, text in rows:
            last = place
            yield place, text
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # It names the file.
        after = f"{last.removeprefix(f'{file}, ')} was the last that could be read" if "," in last else "none was read"
        raise ValueError(
            f"{file}: it is damaged, or not what its name says ({' '.join(str(error).split())}); {after}. Restore the "
            "file, or take it out of the folder"
        ) from error


def _open(file: Path) -> io.BufferedIOBase:
    """The bytes of a file, decompressed, in UTF-8 and without a byte order mark."""
    raw = file.open("rb")
    if (codec := compression(file)) is not None:
        import pyarrow as pa

        raw = io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(pa.PythonFile(raw), codec)))
    start = raw.peek(4)[:4]
    if start.startswith(codecs.BOM_UTF8):
        raw.read(len(codecs.BOM_UTF8))
    wide = next((encoding for mark, encoding in _WIDE_MARKS.items() if start.startswith(mark)), None)
    if wide is None:
        return raw
    with raw:
        try:
            return io.BytesIO(raw.read().decode(wide).encode())
        except UnicodeError as error:
            raise ValueError(f"{file}: it begins as {wide.upper()}, and is none ({error}); convert the file") from error


def _whole_text(file: Path) -> str:
    with _open(file) as data:
        return _decode(data.read(), str(file))


def _decode(data: bytes, file: str, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{file}, line {line}: byte {data[error.start]:#04x} is not UTF-8 ({error.reason}); convert the file"
        ) from error


def _decoded_lines(file: Path) -> Iterator[str]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            yield _decode(line, str(file), number)


def _read_jsonl(file: Path, text_key: str) -> _Rows:
    for number, line in enumerate(_decoded_lines(file), start=1):
        if line.strip():
            place = f"{file}, line {number}"
            yield place, _text_of(_parsed(line, place), text_key, place)


def _read_json(file: Path, text_key: str) -> _Rows:
    """A list of rows, one row, or one a line."""
    with _open(file) as data:
        lines = [line for _, line in zip(range(2), (line for line in data if line.strip()), strict=False)]
    if len(lines) == 2 and _is_json(lines[0]):
        yield from _read_jsonl(file, text_key)
        return
    parsed = _parsed(_whole_text(file), str(file))
    for number, row in enumerate(cast(list[object], parsed) if isinstance(parsed, list) else [parsed]):
        place = f"{file}, row {number}"
        yield place, _text_of(row, text_key, place)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # A number may be too long for Python, a list too deep.
        raise ValueError(f"{place}: not JSON: {error}") from error


def _text_of(row: object, text_key: str, place: str) -> object:
    if isinstance(row, dict) and text_key in row:
        return cast(dict[str, object], row)[text_key]
    if isinstance(row, str):
        return row
    found = sorted(map(str, cast(dict[str, object], row))) if isinstance(row, dict) else type(row).__name__
    raise _NoFieldError(f"{place}: there is no field {text_key!r}; found {found}. {_other_key(text_key)}")


def _other_key(text_key: str) -> str:
    return f"Rename what holds the text to {text_key!r}, or give its name: --text_key NAME, in Python text_key="


def _read_table(file: Path, text_key: str) -> _Rows:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(_decoded_lines(file), delimiter="\t" if suffix(file) == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        if text_key not in header:
            raise _NoFieldError(f"{file}: there is no column {text_key!r}; found {header}. {_other_key(text_key)}")
        column = header.index(text_key)
        for row in rows:
            place = f"{file}, line {rows.line_num}"
            if row and len(row) <= column:
                raise ValueError(f"{place}: a row of {len(row)} fields, where {header} are {len(header)}")
            if row:
                yield place, row[column]
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: {error}") from error


def _read_parquet(file: Path, text_key: str) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = file
    if compression(file) is not None:
        with _open(file) as data:
            source = pa.BufferReader(data.read())
    try:
        parquet = pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a parquet file: {error}") from error
    with parquet:
        columns: list[str] = parquet.schema_arrow.names
        if text_key not in columns:
            raise ValueError(f"{file}: there is no column {text_key!r}; found {columns}. {_other_key(text_key)}")
        kind = parquet.schema_arrow.field(text_key).type
        texts = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(str(texts).startswith(known) for known in ("string", "large_string", "null")):
            raise ValueError(f"{file}: the column {text_key!r} is of {kind}, not text. {_other_key(text_key)}")
        number = 0
        for batch in parquet.iter_batches(_PARQUET_ROWS, columns=[text_key]):
            for text in batch.column(0):
                place = f"{file}, row {number}"
                try:
                    yield place, text.as_py()
                except UnicodeDecodeError as error:
                    wrong = error.object[error.start]
                    raise ValueError(
                        f"{place}: byte {wrong:#04x} of the field {text_key!r} is not UTF-8 ({error.reason}); repair it"
                    ) from error
                number += 1
