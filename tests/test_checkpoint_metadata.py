import json
from dataclasses import replace
from pathlib import Path

import pytest

from grug_native.checkpoint.metadata import (
    METADATA_FILE,
    CheckpointMismatchError,
    DamagedCheckpointError,
    LeafRecord,
    canonical_hash,
    check_identity,
    config_differences,
    leaf_differences,
    read_metadata,
    write_metadata,
)
from grug_native.data.record import DataRecord
from tests.small_state import IDENTITY, make_metadata

LEAVES = {"step": LeafRecord((), "int32", None, "00"), "training_key": LeafRecord((2,), "uint32", "threefry2x32", "11")}
METADATA = replace(make_metadata(7), leaves=LEAVES, lineage=("step 5: a: stored 1, wanted 2",))


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_metadata(tmp_path, METADATA)
    assert read_metadata(tmp_path) == METADATA
    write_metadata(tmp_path, replace(METADATA, kind="temporary"))
    assert read_metadata(tmp_path) == replace(METADATA, kind="temporary")
    assert [path.name for path in tmp_path.iterdir()] == [METADATA_FILE]


def test_no_bit_of_the_file_can_flip_unnoticed(tmp_path: Path) -> None:
    write_metadata(tmp_path, METADATA)
    path = tmp_path / METADATA_FILE
    sound = path.read_bytes()
    for position in range(len(sound)):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(DamagedCheckpointError):
            read_metadata(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"metadata": {}, "sha256": "x"}', "[" * 100_000])
def test_anything_else_is_damage(content: str, tmp_path: Path) -> None:
    (tmp_path / METADATA_FILE).write_text(content)
    with pytest.raises(DamagedCheckpointError, match=METADATA_FILE):
        read_metadata(tmp_path)


def test_a_missing_or_huge_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match="No such file"):
        read_metadata(tmp_path)
    with (tmp_path / METADATA_FILE).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DamagedCheckpointError, match="larger than"):
        read_metadata(tmp_path)


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    write_metadata(tmp_path, replace(METADATA, format_version=99, versions={"grug-native": "9.9"}))
    with pytest.raises(CheckpointMismatchError, match=r"format_version=99.*9\.9"):
        read_metadata(tmp_path)


def test_differences_are_named_with_both_values() -> None:
    differences = config_differences({"a": {"b": 1, "c": None}, "d": [1]}, {"a": {"b": 2, "c": None}, "e": "x"})
    assert [str(d) for d in differences] == [
        "a.b: stored 1, wanted 2",
        "d: stored [1], wanted None",
        'e: stored None, wanted "x"',
    ]
    assert canonical_hash({"a": 1, "b": 2}) == canonical_hash({"b": 2, "a": 1}) != canonical_hash({"a": 1})


def test_leaves_differ_by_shape_type_and_generator_not_by_digest() -> None:
    wanted = {"step": LeafRecord((), "int32", None), "training_key": LeafRecord((4,), "uint32", "rbg")}
    assert [str(d) for d in leaf_differences(LEAVES, wanted)] == [
        "training_key: stored uint32[2] (threefry2x32 key), wanted uint32[4] (rbg key)"
    ]


def test_the_same_run_may_go_on() -> None:
    assert check_identity(METADATA, IDENTITY) == METADATA.lineage


def test_other_data_are_told_by_their_files_and_may_be_allowed() -> None:
    before = DataRecord({"component/a": "1", "tokenizer": "t", "config": "c"}, {"a.txt": (5, "A"), "b.txt": (6, "B")})
    after = DataRecord({"component/a": "2", "tokenizer": "t", "config": "c"}, {"a.txt": (5, "A"), "c.txt": (7, "C")})
    changed = replace(IDENTITY, data_fingerprint="data-2", data=after, known_data={"data-1": before})
    with pytest.raises(CheckpointMismatchError) as refused:
        check_identity(METADATA, changed)
    words = "1 file came (c.txt, 7 bytes); 1 file went (b.txt, 6 bytes); other tokens in a"
    assert words in str(refused.value) and "'--trainer.allow_changes=[data_fingerprint]'" in str(refused.value)
    lineage = check_identity(METADATA, replace(changed, allowed_changes=("data_fingerprint",)))
    assert lineage[-1] == f"step 7: data_fingerprint: stored data-1, wanted data-2 ({words})"
    with pytest.raises(CheckpointMismatchError, match="which files changed is not known"):
        check_identity(METADATA, replace(changed, known_data={}))


def test_nobody_can_allow_another_tokenizer_under_trained_parameters() -> None:
    changed = replace(
        IDENTITY, tokenizer_digest="tokenizer-2", allowed_changes=("tokenizer_digest", "data_fingerprint")
    )
    with pytest.raises(CheckpointMismatchError, match=r"tokenizer cannot change.*give that of the run") as refused:
        check_identity(METADATA, changed)
    assert "allow_changes" not in str(refused.value)
    assert check_identity(make_metadata(0), changed)[-1].startswith("step 0: tokenizer_digest: stored tokenizer-1")


@pytest.mark.parametrize(
    ("field", "value"), [("run_id", "other"), ("data_fingerprint", "data-2"), ("tokenizer_digest", "tokenizer-2")]
)
def test_another_run_or_other_data_is_refused(field: str, value: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=rf"{field}: stored .*, wanted {value}"):
        check_identity(METADATA, replace(IDENTITY, **{field: value}))


def test_a_setting_that_changes_the_mathematics_is_refused_until_allowed() -> None:
    config = json.loads(json.dumps(IDENTITY.config))
    config["optimizer"]["learning_rate"] = 0.002
    config["trainer"]["log_every"] = 50
    changed = replace(IDENTITY, config=config)
    with pytest.raises(CheckpointMismatchError) as refused:
        check_identity(METADATA, changed)
    assert [d.name for d in refused.value.differences] == ["optimizer.learning_rate"]
    assert "'--trainer.allow_changes=[optimizer.learning_rate]'" in str(refused.value)
    assert "optimizer.learning_rate: stored 0.001, wanted 0.002" in str(refused.value)
    for allowed in ("optimizer.learning_rate", "optimizer"):
        lineage = check_identity(METADATA, replace(changed, allowed_changes=(allowed,)))
        assert lineage == (*METADATA.lineage, "step 7: optimizer.learning_rate: stored 0.001, wanted 0.002")
    with pytest.raises(CheckpointMismatchError, match=r"=\[optim, optimizer\.learning_rate\]'"):
        check_identity(METADATA, replace(changed, allowed_changes=("optim",)))
