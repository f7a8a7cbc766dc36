import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from grug_native.bucket.owner import Owner
from grug_native.bucket.run_head import (
    CheckpointEntry,
    HeadError,
    RunHead,
    Segment,
    SmallFile,
    attempt_of,
    epoch_of,
    live_name,
    new_name,
)
from grug_native.checkpoint.metadata import CheckpointError, canonical_hash

OWNER = Owner(host="h", pid=7, process="", nonce="0" * 8, since="2026-01-01T00:00:00+00:00", lease=60.0)


def entry(step: int, epoch: int = 1) -> CheckpointEntry:
    prefix = new_name("checkpoints/", step, epoch)
    return CheckpointEntry(step=step, kind="permanent", root=None, prefix=prefix, sha256=f"{step:064x}")


def segment(first: int, epoch: int = 1, size: int = 10) -> Segment:
    return Segment(name=new_name("log/", first, epoch), first=first, size=size, sha256=f"{first:064x}")


def small_file(path: str, epoch: int = 1) -> SmallFile:
    return SmallFile(path=path, name=new_name("files/", path, epoch), sha256="0" * 64)


def example() -> RunHead:
    head = RunHead(run_id="run").claimed(OWNER)
    head = head.committed(entry(2), segment(0), [small_file("config.yaml")]).committed(entry(4), segment(2))
    return head.aside([head.checkpoints[1]], "corrupt", "a digest").recorded(None, [small_file("harness/a.json")])


class AnyOrder(RuleBasedStateMachine):
    """Whatever is done in whatever order, the laws hold, the bytes come back, and no commit is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.head = RunHead(run_id="run")
        self.seen: set[bytes] = set()
        self.lost: set[str] = set()

    def become(self, head: RunHead) -> None:
        self.head = replace(head, serial=self.head.serial + 1)

    @initialize()
    def start(self) -> None:
        self.become(self.head.claimed(OWNER))

    @rule()
    def take(self) -> None:
        self.become(self.head.claimed(OWNER))

    @rule(ahead=st.integers(1, 5), logs=st.booleans())
    def commit(self, ahead: int, logs: bool) -> None:
        last = max(self.head.steps, default=0)
        first = max(last, max((s.first + 1 for s in self.head.log), default=0))
        new = entry(last + ahead, self.head.epoch)
        lines = segment(first, self.head.epoch) if logs else None
        self.become(self.head.committed(new, lines, [small_file("samples.md", self.head.epoch)]))
        assert self.head.checkpoints[-1] == new and self.head.committed(new, lines) == self.head, "a lost answer"

    @rule(keep=st.integers(1, 3))
    def retire(self, keep: int) -> None:
        old = self.head.checkpoints[:-keep]
        self.lost |= {c.prefix for c in old}
        self.become(self.head.without(old))

    @rule(data=st.data())
    def step_back(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from([0, *self.head.steps]))
        newer = [c for c in self.head.checkpoints if c.step > step]
        self.become(self.head.aside(newer, "abandoned", "by hand").cut(step))
        assert all(s.first < step for s in self.head.log) and self.head.steps == [
            s for s in self.head.steps if s <= step
        ]

    @rule()
    def beat(self) -> None:
        self.become(self.head)

    @invariant()
    def it_comes_back_and_is_new(self) -> None:
        data = self.head.encode()
        assert RunHead.decode(data, where="x") == self.head
        assert not self.lost & set(self.head.names())
        self.seen.add(data)
        assert len(self.seen) >= self.head.serial, "two versions with the same bytes would have one ETag"


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
test_any_order = AnyOrder.TestCase


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_flipped_bit_is_refused_or_changes_nothing(data: st.DataObject) -> None:
    head = example()
    raw = bytearray(head.encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(HeadError):
        assert RunHead.decode(bytes(raw), where="x") == head


def set_in(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        place: Any = body
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in(["epoch"], "1"), "no int"),
        (set_in(["epoch"], True), "no int"),
        (set_in(["serial"], -1), "no int"),
        (set_in(["owner", "lease"], 60), "no float"),
        (set_in(["checkpoints"], {}), "no list"),
        (set_in(["checkpoints", 0, "kind"], "other"), "none of"),
        (set_in(["checkpoints", 0, "more"], 1), "has not the fields"),
        (set_in(["checkpoints", 0, "prefix"], "checkpoints/../x/"), "no name"),
        (set_in(["checkpoints", 0, "prefix"], "checkpoints/step-2.9-00000000/"), "no name"),
        (set_in(["owner"], {}), "has not the fields"),
    ],
)
def test_what_this_module_did_not_write_is_refused(change: Callable[[dict[str, Any]], None], words: str) -> None:
    body = json.loads(example().encode())["run"]
    change(body)
    raw = json.dumps({"sha256": canonical_hash(body), "run": body}).encode()
    with pytest.raises(HeadError, match=rf"gs://b/run.json is damaged .*{words}.*put back an earlier version"):
        RunHead.decode(raw, where="gs://b/run.json")


def test_a_newer_format_is_refused_as_that() -> None:
    body = json.loads(example().encode())["run"] | {"format_version": 2, "new": 1}
    raw = json.dumps({"sha256": canonical_hash(body), "run": body}).encode()
    with pytest.raises(
        HeadError, match="format_version=2, and this version reads 1: use the grug-native that wrote it"
    ):
        RunHead.decode(raw, where="run.json")


def test_a_commit_below_a_newer_checkpoint_is_refused() -> None:
    head = RunHead(run_id="run").claimed(OWNER).committed(entry(4), None)
    with pytest.raises(CheckpointError, match=r"cannot commit step 2: steps \[4\] are newer"):
        head.committed(entry(2), None)


def test_a_checkpoint_takes_the_place_of_one_of_its_step() -> None:
    head = RunHead(run_id="run").claimed(OWNER).committed(entry(4), segment(0))
    again = entry(4)
    assert head.committed(again, None).checkpoints == (again,)


def test_the_laws_hold_for_what_is_made_by_hand() -> None:
    head = RunHead(run_id="run").claimed(OWNER)
    with pytest.raises(ValueError, match="must each rise"):
        replace(head, checkpoints=(entry(4), entry(2)))
    one = entry(4)
    with pytest.raises(ValueError, match="is named twice"):
        replace(head, checkpoints=(one, replace(one, step=6)))


def test_names_tell_their_epoch_and_their_attempt() -> None:
    assert epoch_of(new_name("checkpoints/", 20, 3)) == 3
    assert epoch_of(new_name("log/", 0, 12)) == 12
    assert epoch_of(new_name("files/", "harness/step-2.json", 4)) == 4
    assert epoch_of(live_name(OWNER, 5)) == 5
    for name in (
        "checkpoints/step-2/",
        "checkpoints/mine/",
        "log/notes.jsonl",
        "config.yaml",
        "files/x",
        "other/1.2-00000000",
    ):
        assert epoch_of(name) is None
    assert attempt_of("checkpoints/step-2.1-00000000/params/w/c/0") == "checkpoints/step-2.1-00000000/"
    assert attempt_of("log/0.1-00000000.jsonl") == "log/0.1-00000000.jsonl"
