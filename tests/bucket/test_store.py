import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grug_native.bucket import store as module
from grug_native.bucket.errors import (
    CredentialsError,
    NoConditionsError,
    NoSuchBucketError,
    StoreError,
    UnreachableError,
)
from grug_native.bucket.store import Store, check_store, patiently
from tests.bucket.careless import CarelessStore
from tests.bucket.proxy import Rule
from tests.bucket.servers import READ_ONLY_KEY, READ_ONLY_SECRET, Bucket, environment, free_port
from tests.bucket.toy import QUICK

ALWAYS = 10_000
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


@pytest.mark.parametrize(
    "url", ["runs/x", "gs://", "gs://bucket", "gs://bucket/../x", "s3://bucket/a//b", "http://h/x", "gs://bucket/a?x=1"]
)
def test_what_is_no_folder_in_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"trainer.temporary_root=.* must be a folder in a bucket"):
        Store(url, field="trainer.temporary_root")


def test_a_name_that_no_bucket_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output_path='s3://b/x' is refused: Invalid S3 bucket name"):
        Store("s3://b/x")


def write_conditionally(store: Store) -> None:
    first = store.put("a", b"1", over=None)
    assert first is not None
    assert store.put("a", b"2", over=None) is None
    second = store.put("a", b"3", over=first)
    assert second is not None and store.put("a", b"4", over=first) is None
    found = store.get("a")
    assert found is not None and (found.data, found.generation) == (b"3", second)
    store.overwrite("a", b"5")
    assert store.put("a", b"6", over=second) is None
    for key in ("b/1", "b/2", "bc"):
        store.put(key, b"x", over=None)
    assert store.list("") == ["a", "b/1", "b/2", "bc"] and store.list("b/") == ["b/1", "b/2"]
    store.delete_under("b/")
    store.delete("a")
    assert store.list("") == ["bc"] and store.get("a") is None
    assert store.put("a", b"7", over=second) is None


def test_writes_keep_their_conditions_on_disk(folder: str) -> None:
    write_conditionally(Store(folder))


def test_writes_keep_their_conditions_in_a_bucket(bucket: Bucket) -> None:
    write_conditionally(Store(bucket.new_folder(), retries=QUICK))


def test_the_probe_accepts_a_store_and_leaves_nothing(bucket: Bucket, folder: str) -> None:
    for url in (bucket.new_folder(), folder):
        store = Store(url, retries=QUICK)
        check_store(store)
        assert store.list("") == []


@pytest.mark.parametrize("do", ["lost", "cut"])
@pytest.mark.parametrize("change", ["create", "replace"])
def test_a_write_whose_answer_is_lost_is_done(bucket: Bucket, do: str, change: str) -> None:
    store = Store(bucket.new_folder(), retries=QUICK)
    over = store.put("a", b"0", over=None) if change == "replace" else None
    rule = bucket.proxy.add_rule(Rule("lost" if do == "lost" else "cut", "^(PUT|POST)"))
    written = store.put("a", b"1", over=over)
    found = store.get("a")
    assert rule.struck == 1 and found is not None and (found.data, found.generation) == (b"1", written)


def test_a_conflict_that_the_store_cannot_decide_is_looked_at(bucket: Bucket) -> None:
    """GCS answers 409 now and then; TensorStore gives up at once."""
    store = Store(bucket.new_folder(), retries=QUICK)
    first = store.put("a", b"1", over=None)
    bucket.proxy.set_rules(Rule("answer", "^(PUT|POST)", times=ALWAYS, status=409))
    with pytest.raises(UnreachableError):
        store.put("a", b"2", over=first)
    assert store.put("a", b"1", over=None) is not None if bucket.scheme == "gs" else True


def expect(store: Store, kind: type[StoreError], *words: str) -> None:
    with pytest.raises(kind) as raised:
        check_store(store)
    for word in (store.url, *words):
        assert word in str(raised.value)
    assert len(str(raised.value)) < 900 and "source locations" not in str(raised.value)


def test_a_bucket_that_is_not_there_is_named(bucket: Bucket) -> None:
    expect(
        Store(f"{bucket.scheme}://no-such-bucket/run", retries=QUICK), NoSuchBucketError, "no bucket 'no-such-bucket'"
    )


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_are_refused(bucket: Bucket, status: int) -> None:
    bucket.proxy.set_rules(Rule("answer", times=ALWAYS, status=status))
    way_out = "AWS_ACCESS_KEY_ID" if bucket.scheme == "s3" else "gcloud auth application-default login"
    expect(Store(bucket.new_folder(), retries=QUICK), CredentialsError, way_out)


def test_a_wrong_key_and_one_that_may_only_read(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    expect(Store(s3.new_folder(), retries=QUICK), CredentialsError, "InvalidAccessKeyId")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READ_ONLY_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READ_ONLY_SECRET)
    expect(Store(s3.new_folder(), retries=QUICK), CredentialsError, "AccessDenied")


def test_an_expired_token_is_a_matter_of_credentials(bucket: Bucket) -> None:
    """S3 answers 400, for which TensorStore has no code in words."""
    bucket.proxy.set_rules(Rule("answer", "^", times=ALWAYS, status=400, body=EXPIRED))
    expect(Store(bucket.new_folder(), retries=QUICK), CredentialsError, "expired")


@pytest.mark.parametrize("status", [429, 503])
def test_a_store_that_is_overloaded(bucket: Bucket, status: int) -> None:
    bucket.proxy.set_rules(Rule("answer", "^", times=2, status=status))
    check_store(Store(bucket.new_folder(), retries=QUICK))
    bucket.proxy.set_rules(Rule("answer", "^", times=ALWAYS, status=status))
    endpoint = "AWS_ENDPOINT_URL" if bucket.scheme == "s3" else "TENSORSTORE_GCS_HTTP_URL"
    expect(Store(bucket.new_folder(), retries=QUICK), UnreachableError, endpoint)


def test_a_store_that_hangs(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEADLINE", 0.3)
    bucket.proxy.set_rules(Rule("hang", "^", times=ALWAYS, seconds=1.0))
    expect(Store(bucket.new_folder(), retries=QUICK), UnreachableError, "does not answer, or not in time")


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("s3", f"http://127.0.0.1:{free_port()}").items():
        monkeypatch.setenv(name, value)
    expect(Store("s3://bucket/run", retries=QUICK), UnreachableError, "Could not connect")


def test_a_store_that_ignores_conditions_is_refused(gcs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in gcs.environment().items():
        monkeypatch.setenv(name, value)
    gcs.proxy.keeps_conditions = False
    try:
        expect(Store(gcs.new_folder(), retries=QUICK), NoConditionsError, "ignores the condition if-none-match")
    finally:
        gcs.proxy.keeps_conditions = True


def test_a_store_that_keeps_the_conditions_of_reads_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    careless = CarelessStore()
    for name, value in environment("s3", careless.url).items():
        monkeypatch.setenv(name, value)
    try:
        store = Store("s3://bucket/run", retries=QUICK)
        first = store.put("a", b"1", over=None)
        assert first and store.put("a", b"2", over=None) is None, "TensorStore looks before it writes"
        expect(store, NoConditionsError, "ignores the condition if-none-match")
    finally:
        careless.close()


def test_what_is_in_trouble_is_tried_again_for_as_long_as_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    calls: list[float] = []

    def failing(until: float, error: Callable[[str], Exception] = UnreachableError) -> str:
        calls.append(now[0])
        if now[0] < until:
            raise error("away")
        return "done"

    assert patiently("it", lambda: failing(100.0), patience=200.0) == "done"
    assert calls[:5] == [0.0, 0.5, 1.5, 3.5, 7.5]
    with pytest.raises(CredentialsError):
        patiently("it", lambda: failing(1e9, CredentialsError), patience=60.0)
    assert calls[-1] - 60.0 == pytest.approx(next(c for c in calls if c >= 100.0))
    with pytest.raises(NoConditionsError):
        patiently("it", lambda: failing(1e9, NoConditionsError), patience=60.0)


def test_a_chunk_that_is_gone_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/run")
    grid = {"name": "regular", "configuration": {"chunk_shape": [2]}}
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    metadata = {"shape": [4], "data_type": "float32", "chunk_grid": grid, "codecs": codecs}
    store.array("x", metadata, write=True).write(np.zeros(4, np.float32)).result()
    assert store.list("x/") == ["x/c/0", "x/c/1", "x/zarr.json"]
    store.delete("x/c/1")
    with pytest.raises(ValueError, match=r"NOT_FOUND: chunk \{1\}"):
        store.reopened().array("x", metadata).read().result()
