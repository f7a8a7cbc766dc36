import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grug_native.config import config_from_dict, config_to_dict
from grug_native.data.documents import find_files
from grug_native.launch.text_run import choose_model, choose_steps, text_domains, text_run
from grug_native.metrics import parameter_counts
from grug_native.runner import GrugRunner
from tests.fixtures_data import make_text


def write(folder: Path, name: str, size: int) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    text = make_text(len(name), 2000).encode("ascii", "replace").decode()
    (folder / name).write_text(f"{name}\n" + (text * (size // len(text) + 1))[: size - len(name) - 1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Much Python, some Markdown, and a little of two other kinds."""
    for number in range(8):
        write(tmp_path / "my notes" / "code", f"{number}.py", 40_000)
    write(tmp_path / "my notes", "a.md", 120_000)
    write(tmp_path / "my notes", "b.md", 20_000)
    write(tmp_path / "my notes", "c.txt", 30_000)
    write(tmp_path / "my notes", "d.rst", 5_000)
    (tmp_path / "my notes" / "empty.txt").write_text("")
    (tmp_path / "my notes" / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path / "my notes"


def test_domains_of_little_text_are_none_of_their_own(folder: Path) -> None:
    files = find_files("x", folder).files
    domains = text_domains(folder, {file: file.stat().st_size for file in files})
    assert {name: len(files) for name, files in domains.items()} == {"md": 2, "py": 10}
    assert {file.name for file in domains["py"]} >= {"c.txt", "d.rst", "7.py"}


def test_a_run_of_a_folder(folder: Path, tmp_path: Path) -> None:
    config = text_run(folder, runs=tmp_path / "runs")
    assert Path(config.output_path) == tmp_path / "runs" / "my notes"
    assert config.data.train_weights == {"py": pytest.approx(355 / 495), "md": pytest.approx(140 / 495)}
    assert config.trainer.batch_size_at(0) % 4 == 0
    assert len(config.eval.sample_prompts) == 2
    assert all(0 < len(prompt) <= 40 for prompt in config.eval.sample_prompts)
    # The same text makes the same run; a plan finds nothing wrong with it; there is something held out of each domain.
    assert config_to_dict(text_run(folder, runs=tmp_path / "runs")) == config_to_dict(config)
    assert config_from_dict(config_to_dict(config)) == config
    runner = GrugRunner(config)
    vocabulary = runner.plan().vocabulary
    assert vocabulary is not None
    assert 300 < vocabulary <= config.model.vocab_size
    assert runner.batch(0).tokens.shape == (8, 256)
    assert Path(text_run(folder, name="other", runs=tmp_path / "runs").output_path).name == "other"


def test_one_file_is_a_domain(tmp_path: Path) -> None:
    write(tmp_path, "verses.txt", 200_000)
    config = text_run(tmp_path / "verses.txt", runs=tmp_path / "runs")
    assert list(config.data.components) == ["verses"]
    assert Path(config.output_path).name == "verses"


def test_what_runs_write_is_no_text(folder: Path) -> None:
    runs = folder / "runs"
    config = text_run(folder, runs=runs)
    for written in (runs / "my notes" / "metrics.jsonl", folder / "mine" / "samples.md", folder / ".hidden" / "a.py"):
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text("{}\n")
    again = text_run(folder, runs=runs, output_path=str(folder / "mine"))
    assert again.data == config.data
    assert again.output_path == str(folder / "mine")
    with pytest.raises(ValueError, match=r"is where the texts are, and .* give another folder, such as .*my notes-run"):
        text_run(folder, runs=runs, output_path=f"{folder}/")


def test_a_suffix_may_be_in_capitals_and_the_first_rows_empty(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.JSONL").write_text('{"text": ""}\n')
    (tmp_path / "texts" / "b.jsonl").write_text(
        f"{json.dumps({'text': ''})}\n{json.dumps({'text': make_text(0, 30_000)})}\n"
    )
    write(tmp_path / "texts", "c.TXT", 200_000)
    config = text_run(tmp_path / "texts", runs=tmp_path / "runs")
    assert list(config.data.components) == ["b", "texts"]
    assert config.eval.sample_prompts[0].startswith("document0")


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "few", "a.txt", 5_000)
    with pytest.raises(ValueError, match=r"few holds 5,000 bytes of text: a model needs some more"):
        text_run(tmp_path / "few", runs=tmp_path / "runs")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="holds no file with text in it"):
        text_run(tmp_path / "none", runs=tmp_path / "runs")
    with pytest.raises(ValueError, match="does not exist"):
        text_run(tmp_path / "nowhere", runs=tmp_path / "runs")


def test_models_grow_with_the_text_and_not_on_a_cpu() -> None:
    sizes = [parameter_counts(choose_model(10**n, on_cpu=False))["total"] for n in range(5, 11)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 3e6 < 1e8 < sizes[-1]
    for power in range(6, 10):
        assert parameter_counts(choose_model(10**power, on_cpu=False))["total"] <= max(4 * 10**power / 20, 3e6)
    assert choose_model(10**9, on_cpu=True).hidden_dim == 128


def test_steps_show_the_text_a_few_times_within_what_a_cpu_can_do() -> None:
    assert choose_steps(10_000, 2048) == 100
    assert choose_steps(100_000, 2048) == 195
    assert choose_steps(10**9, 2048) == choose_steps(10**12, 2048) <= 256 * 16


def _domains(root: Path, *names: str) -> dict[str, list[str]]:
    files = [root / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = text_domains(root, dict.fromkeys(files, 10**6))
    return {domain: [str(file.relative_to(root)) for file in members] for domain, members in found.items()}


def test_domains_are_named_after_folders_and_files(tmp_path: Path) -> None:
    assert _domains(tmp_path / "a", "wiki/0.parquet", "wiki/1.parquet", "books/x/0.jsonl.gz") == {
        "books": ["books/x/0.jsonl.gz"],
        "wiki": ["wiki/0.parquet", "wiki/1.parquet"],
    }
    assert _domains(tmp_path / "my data", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet") == {
        "my-data": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    }
    assert list(_domains(tmp_path / "b", "news-1.jsonl", "news-2.jsonl", "日本語.csv", "0001.json")) == [
        "b",
        "news",
        "日本語",
    ]
    assert list(_domains(tmp_path / "c", "shakespeare/a.txt", "milton/b.txt", "c.txt")) == [
        "c",
        "milton",
        "shakespeare",
    ]
    assert list(_domains(tmp_path / "d", "one/a.py", "two/b.md", "rows.jsonl")) == ["md", "py", "rows"]
    assert list(_domains(tmp_path / "train", "a.txt")) == ["text"]


def test_sizes_are_those_of_the_text(tmp_path: Path) -> None:
    texts = [make_text(seed, 2000) for seed in range(20)]
    size = sum(len(text.encode()) for text in texts)
    folder = tmp_path / "rows"
    folder.mkdir()
    numbers = [[float(n * seed) for n in range(20_000)] for seed in range(20)]
    pq.write_table(pa.table({"text": texts, "embedding": numbers}), folder / "fat.parquet")
    fat = text_run(folder, runs=tmp_path / "runs")
    assert (folder / "fat.parquet").stat().st_size > 5 * size
    (folder / "fat.parquet").unlink()
    with gzip.open(folder / "thin.jsonl.gz", "wt") as rows:
        rows.writelines(f"{json.dumps({'text': text})}\n" for text in texts)
    assert (folder / "thin.jsonl.gz").stat().st_size < 100_000 < size
    thin = text_run(folder, runs=tmp_path / "runs")
    assert (thin.trainer, thin.model, thin.eval) == (fat.trainer, fat.model, fat.eval)
    assert fat.trainer.num_train_steps == choose_steps(int(size / 3.2), 2048)


def test_it_says_what_was_read_passed_over_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[str | None] = [None, "", *(make_text(seed, 2000) for seed in range(12)), make_text(0, 2000)]
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps({'body': text})}\n" for text in rows))
    (folder / "paper.pdf").write_text("%PDF")
    caplog.set_level("INFO")
    for _ in range(2):
        caplog.clear()
        config = text_run(folder, runs=tmp_path / "runs", text_key="body")
        for words in (
            r"mine: read 1 \.jsonl with 12 documents, [\d,]+ bytes of text",
            "passed over 1 empty, 1 null, 1 repeated",
            r"left out 1 \(of no kind that is read: paper\.pdf\)",
            r"rows: train \d+ documents, [\d,]+ bytes, [\d,]+ tokens; held out \d+ documents?, .* of the bytes",
        ):
            assert re.search(words, caplog.text), words
        assert "held out" in str(GrugRunner(config).plan())


@pytest.mark.parametrize("name", ["日本語", "中文", "हिन्दी", "my notes"])
def test_a_run_is_called_as_its_folder_is(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "a.txt", 120_000)
    config = text_run(tmp_path / name, runs=tmp_path / "runs")
    assert Path(config.output_path) == tmp_path / "runs" / name
    assert config.run_id == name


def test_what_a_run_among_the_texts_has_written_is_no_text(tmp_path: Path) -> None:
    write(tmp_path / "texts", "a.txt", 1000)
    (tmp_path / "texts" / "run" / "checkpoints").mkdir(parents=True)
    for name, content in (("config.yaml", "model: {}"), ("metrics.jsonl", '{"step": 0}'), ("log.txt", "said")):
        (tmp_path / "texts" / "run" / name).write_text(content)
    found = find_files("x", tmp_path / "texts")
    assert [file.name for file in found.files] == ["a.txt"]
    assert found.left_out == {"the folder of a run": ["run"]}
