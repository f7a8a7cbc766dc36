import codecs
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grug_native.data.documents import find_files, read_documents, read_rows


def _packed(content: bytes, file: Path) -> None:
    with pa.output_stream(str(file), compression={".zst": "zstd", ".bz2": "bz2", ".gz": "gzip"}[file.suffix]) as out:
        out.write(content)


_ROWS = b'{"text": "one"}\n{"text": "tw\xc3\xb6"}\n'


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.zst", "a.txt.gz", "a.TXT.GZ", "a.md.bz2"])
def test_compressed_files_are_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.touch()
    _packed(_ROWS, file if file.suffix.islower() else file.with_suffix(".gz"))
    if not file.suffix.islower():
        file.with_suffix(".gz").rename(file)
    rows = ["one", "twö"] if ".json" in name else [_ROWS.decode()]
    assert list(read_documents(find_files("x", tmp_path).files[0], "text")) == rows


def test_several_streams_in_a_file_are_all_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_ROWS) + gzip.compress(_ROWS))
    assert list(read_documents(tmp_path / "a.jsonl.gz", "text")) == ["one", "twö"] * 2


def test_a_compressed_parquet_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert list(read_documents(tmp_path / "b.parquet.gz", "text")) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b\\n"}]',
        '[\n {"text": "a"},\n {"text": "b\\n"}\n]\n',
        '{"text": "a"}\n\n{"text": "b\\n"}\n',
        '["a", "b\\n"]',
    ],
)
def test_json_is_a_list_or_a_row_a_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert list(read_documents(tmp_path / "a.json", "text")) == ["a", "b\n"]


def test_tables_are_read_by_their_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,body\n1,"first, with ""quotes""\nand a line"\n2,second\n3,\n')
    (tmp_path / "a.tsv").write_text("body\tid\nthird\t1\n")
    assert list(read_documents(tmp_path / "a.csv", "body")) == ['first, with "quotes"\nand a line', "second"]
    assert list(read_documents(tmp_path / "a.tsv", "body")) == ["third"]
    long = "x" * 300_000
    (tmp_path / "a.csv").write_text(f"body\n{long}\n")
    assert list(read_documents(tmp_path / "a.csv", "body")) == [long]


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_read_everywhere(tmp_path: Path, mark: str) -> None:
    for name, content in (
        ("a.txt", "grüße"),
        ("a.jsonl", '{"text": "grüße"}\n'),
        ("a.json", '[{"text": "grüße"}]'),
        ("a.csv", "text,n\ngrüße,1\n"),
    ):
        (tmp_path / name).write_bytes(content.encode(mark))
        assert list(read_documents(tmp_path / name, "text")) == ["grüße"], name


def test_nulls_and_empties_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "a"}\n')
    pq.write_table(pa.table({"text": [None, "", "a"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_rows(tmp_path / name, "text")) == [None, "", "a"]
        assert list(read_documents(tmp_path / name, "text")) == ["a"]
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "none.parquet")
    assert list(read_rows(tmp_path / "none.parquet", "text")) == [None, None]


def _bad_utf8(file: Path) -> None:
    data = [pa.py_buffer(b""), pa.py_buffer(b"fine\xff\xfeno"), None]
    offsets = pa.array([0, 4, 8], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(2, offsets, data[1])
    pq.write_table(pa.table({"text": texts}), file)


def _damaged_parquet(file: Path) -> None:
    rng = os.urandom(60_000).hex()
    pq.write_table(pa.table({"text": [rng[n : n + 100] for n in range(0, 120_000, 100)]}), file, compression="zstd")
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 2000] = bytes(2000)
    file.write_bytes(data)


def _truncated(file: Path) -> None:
    data = gzip.compress(b"".join(b'{"text": "line %d"}\n' % n for n in range(100_000)))
    file.write_bytes(data[: len(data) // 2])


def test_damage_is_reported_with_file_and_place(tmp_path: Path) -> None:
    for name, make, words in (
        ("bad.parquet", _bad_utf8, r"bad\.parquet, row 1: byte 0xff of the field 'text' is not UTF-8"),
        ("rot.parquet", _damaged_parquet, r"rot\.parquet: it is damaged, .*; (row \d+ was the last|none was read)"),
        ("cut.jsonl.gz", _truncated, r"cut\.jsonl\.gz: it is damaged, .*; line \d+ was the last that could be read"),
        ("no.txt.gz", lambda f: f.write_bytes(b"no gzip"), r"no\.txt\.gz: it is damaged, .*; none was read"),
        ("no.txt", lambda f: f.write_bytes(codecs.BOM_UTF16_LE + b"abc"), r"no\.txt: it begins as UTF-16, and is none"),
        ("deep.jsonl", lambda f: f.write_text('{"text": ' + "[" * 100_000), r"deep\.jsonl, line 1: not JSON"),
        ("bad.csv", lambda f: f.write_bytes(b"text,n\na,1\n\xe9,2\n"), r"bad\.csv, line 3: byte 0xe9 is not UTF-8"),
        ("short.csv", lambda f: f.write_text("n,text\n1,a\n2\n"), r"short\.csv, line 3: a row of 1 fields"),
        ("open.csv", lambda f: f.write_text('text\n"a\n'), r"open\.csv, line 2: unexpected end of data"),
        (
            "row.json",
            lambda f: f.write_text('[{"text": "a"}, {"b": 1}]'),
            r"row\.json, row 1: there is no field 'text'",
        ),
    ):
        make(tmp_path / name)
        with pytest.raises(ValueError, match=words):
            list(read_documents(tmp_path / name, "text"))


def test_a_column_that_is_no_text_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [[1.0], [2.0]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: the column 'text' is of list<.*>, not text\..*--text_key"):
        list(read_documents(tmp_path / "a.parquet", "text"))


def test_links_are_followed_and_loops_found(tmp_path: Path) -> None:
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for folder in (texts, elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("a")
    (texts / "linked").symlink_to(elsewhere)
    (texts / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "up").symlink_to(texts)
    (texts / "gone").symlink_to(tmp_path / "nowhere")
    found = find_files("x", texts)
    assert [str(file.relative_to(texts)) for file in found.files] == ["a.txt", "again/a.txt"]
    assert found.left_out == {
        "a link to nothing": ["gone"],
        "a link to a folder that is read already": ["linked/deep", "linked/up"],
    }


def test_what_is_left_out_is_listed_with_the_reason(tmp_path: Path) -> None:
    for name, content in (
        ("README.md", "read me"),
        ("package.json", '{"name": "x"}'),
        ("settings.json", "// a comment\n{}"),
        ("numbers.csv", "a,b\n1,2\n"),
        ("paper.pdf", "%PDF"),
        ("nothing.txt", ""),
        (".env", "SECRET=1"),
        ("rows.json", json.dumps([{"text": "a"}])),
    ):
        (tmp_path / name).write_text(content)
    found = find_files("x", tmp_path)
    assert [file.name for file in found.files] == ["README.md", "rows.json"]
    described = found.describe_left_out()
    for words in ("no JSON: settings.json", "no kind that is read: paper.pdf", "empty: nothing.txt", "1 hidden"):
        assert words in described
    assert "no field 'text'; --text_key names another: numbers.csv, package.json" in described
    # What was asked for by its name is no matter of choice.
    with pytest.raises(ValueError, match="there is no column 'text'"):
        list(read_documents(find_files("x", tmp_path / "numbers.csv").files[0], "text"))
