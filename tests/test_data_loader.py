import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, override

import jax
import numpy as np
import pytest
import tensorstore as ts
from haliax import Axis
from jax.sharding import NamedSharding, PartitionSpec
from levanter.callbacks import mixture_weight_logging_hook
from levanter.data.dataset import AsyncDataset, ListAsyncDataset
from levanter.data.loader import DataLoader
from levanter.data.mixture import MixtureDataset
from levanter.data.text.datasets import (
    BlockShuffleConfig,
    DatasetComponentBase,
    DirectDatasetComponent,
    LmDataConfig,
)
from levanter.data.text.examples import GrugLmExample
from levanter.schedule import BatchSchedule, IntSchedule, ScheduleStep
from levanter.tracker import Tracker
from levanter.tracker.tracker_fns import current_tracker

from grug_native.data import loader as data
from grug_native.data.loader import (
    VocabCheckedDataset,
    batch_at,
    build_train_dataset,
    build_train_loader,
    iter_from_step,
    mixture_metrics,
)
from grug_native.data.token_reader import CachedArray
from grug_native.sharding import create_mesh
from tests.token_caches import levanters

VOCAB = 300
POS = Axis("position", 32)
STAGES = [(0, {"caves": 0.75, "clubs": 0.25}), (4, {"caves": 0.25, "clubs": 0.75})]
GROWING: IntSchedule = [ScheduleStep(0, 4), ScheduleStep(6, 8)]


def _build(
    cfg: LmDataConfig, batch_size: int | IntSchedule = 4, *, vocab_size: int = VOCAB
) -> tuple[MixtureDataset[GrugLmExample], DataLoader[GrugLmExample]]:
    schedule = BatchSchedule(batch_size)
    dataset = build_train_dataset(cfg, POS, jax.random.key(7), batch_schedule=schedule, vocab_size=vocab_size)
    mesh = create_mesh(sorted(schedule.unique_batch_sizes()))
    return dataset, build_train_loader(dataset, mesh, batch_size, prefetch=3)


def _bytes(batch: GrugLmExample) -> list[tuple[str, tuple[int, ...], bytes]]:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
    return [(str(array.dtype), array.shape, array.tobytes()) for array in arrays]


def _take(batches: Iterator[GrugLmExample], number: int) -> list[list[tuple[str, tuple[int, ...], bytes]]]:
    return [_bytes(next(batches)) for _ in range(number)]


_CONFIGS: dict[str, tuple[dict[str, Any], int | IntSchedule]] = {
    "one stage": ({}, 4),
    "two stages, growing batches": ({"train_weights": STAGES}, GROWING),
    "block shuffle": ({"shuffle": BlockShuffleConfig(io_block_size=4, window_blocks=4)}, 8),
    "no shuffle, one component unused": ({"shuffle": False, "train_weights": {"caves": 0.0, "clubs": 1.0}}, 4),
    "one component later, linear shuffle": (
        {
            "shuffle": True,
            "permutation_type": "linear",
            "train_weights": [(0, {"clubs": 0.0, "caves": 1.0}), (4, {"clubs": 0.5, "caves": 0.5})],
        },
        4,
    ),
    "parts of the components": ({"max_train_batches": {"caves": 7}, "num_validation_sequences": {"clubs": 5}}, 4),
}


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_batch_is_a_function_of_config_seed_and_step(small_corpus: LmDataConfig, name: str) -> None:
    """More steps than an epoch of `clubs` has, so that they cross its edge."""
    changes, batch_size = _CONFIGS[name]
    cfg = replace(small_corpus, **changes)
    _, loader = _build(cfg, batch_size)
    unbroken = _take(iter_from_step(loader, 0), 24)
    assert len({leaves[0] for leaves in unbroken}) == 24
    for start in (1, 6, 15):
        assert _take(iter_from_step(loader, start), 24 - start) == unbroken[start:]
    _, anew = _build(cfg, batch_size)
    assert _bytes(batch_at(anew, 17)) == unbroken[17]
    with pytest.raises(ValueError, match="step=-1 must not be negative"):
        batch_at(anew, -1)
    levanters = anew.iter_from_step(3)
    assert _take(levanters, 5) == unbroken[3:8]
    levanters.close()


@pytest.mark.parametrize("name", _CONFIGS)
def test_batches_are_those_of_levanters_mixture(small_corpus: LmDataConfig, name: str) -> None:
    changes, batch_size = _CONFIGS[name]
    cfg, schedule = replace(small_corpus, **changes), BatchSchedule(batch_size)
    dataset, loader = _build(cfg, batch_size)
    theirs = cfg.train_mixture(POS, schedule, key=jax.random.key(7))
    for step in (0, 3, 7, 40):
        first, size = schedule.global_data_offset_by_step(step), schedule.batch_size_at_step(step)
        rows = list(range(first, first + size))
        assert _bytes(batch_at(loader, step)) == _bytes(levanters(theirs, rows)) == _bytes(levanters(dataset, rows))


def test_another_key_gives_other_batches(small_corpus: LmDataConfig) -> None:
    schedule = BatchSchedule(4)
    first, second = (
        build_train_dataset(small_corpus, POS, jax.random.key(seed), batch_schedule=schedule, vocab_size=VOCAB)
        for seed in (0, 1)
    )
    rows = list(range(16))
    assert [_bytes(e) for e in first.as_sync_dataset().get_batch(rows)] != [
        _bytes(e) for e in second.as_sync_dataset().get_batch(rows)
    ]


def test_a_batch_lies_on_the_mesh(small_corpus: LmDataConfig) -> None:
    _, loader = _build(small_corpus, GROWING)
    with jax.set_mesh(loader.mesh):
        for step, size in ((5, 4), (6, 8)):
            batch = batch_at(loader, step)
            assert batch.tokens.shape == batch.loss_weight.shape == (size, POS.size)
            assert batch.tokens.dtype == np.int32 and batch.loss_weight.dtype == np.float32
            for leaf in jax.tree.leaves(batch):
                wanted = NamedSharding(loader.mesh, PartitionSpec(("replica_dcn", "data")))
                assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
            np.testing.assert_array_equal(batch.loss_weight[:, -1], 0)


def test_the_mixture_switches_at_the_exact_step(small_corpus: LmDataConfig) -> None:
    cfg = replace(small_corpus, train_weights=[(0, {"caves": 1.0}), (4, {"clubs": 1.0}), (8, {"caves": 1.0})])
    dataset, loader = _build(cfg)
    known = {
        name: {np.asarray(example.tokens).tobytes() for example in part.as_sync_dataset().get_batch(list(range(20)))}
        for name, part in small_corpus.build_token_datasets(
            small_corpus.build_caches("train"), POS, split="train"
        ).items()
    }
    lengths = {name: len(part.as_sync_dataset()) for name, part in dataset.datasets.items()}
    assert min(lengths.values()) >= 20
    schedule = BatchSchedule(4)
    for step in range(12):
        rows = {row.tobytes() for row in np.asarray(batch_at(loader, step).tokens)}
        here, elsewhere = ("clubs", "caves") if 4 <= step < 8 else ("caves", "clubs")
        assert not rows & known[elsewhere]
        assert mixture_metrics(dataset, schedule, step) == {
            f"mixture/weight/{here}": 1.0,
            f"mixture/weight/{elsewhere}": 0.0,
            "mixture/stage": float(step // 4),
        }
    assert any(
        row.tobytes() in known["clubs"] for step in range(4, 8) for row in np.asarray(batch_at(loader, step).tokens)
    )


class _Recorder(Tracker):
    name = "recorder"

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    @override
    def log(self, metrics: Any, *, step: int | None, commit: bool | None = None) -> None:
        assert step is not None
        self.logged[step] = dict(metrics)

    @override
    def log_hyperparameters(self, hparams: Any) -> None:
        raise NotImplementedError

    @override
    def log_summary(self, metrics: Any) -> None:
        raise NotImplementedError

    @override
    def log_artifact(self, artifact_path: Any, *, name: Any = None, type: Any = None) -> None:
        raise NotImplementedError

    @override
    def finish(self) -> None:
        raise NotImplementedError


def test_mixture_metrics_are_those_of_levanters_hook(small_corpus: LmDataConfig) -> None:
    dataset, _ = _build(replace(small_corpus, train_weights=STAGES), GROWING)
    schedule = BatchSchedule(GROWING)
    recorder = _Recorder()
    hook = mixture_weight_logging_hook(schedule, dataset)

    with current_tracker(recorder):
        for step in range(8):
            info: Any = SimpleNamespace(step=step)  # all of StepInfo that the hook looks at
            hook(info)
    assert sorted(recorder.logged) == [0, 4]
    for step, logged in recorder.logged.items():
        assert mixture_metrics(dataset, schedule, step) == logged
    assert mixture_metrics(dataset, schedule, 3) == recorder.logged[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_weights": [(0, {"caves": 1.0}), (3, {"clubs": 1.0})]},
            r"starts at step 3 .* sequence 12 .*block_size=4",
        ),
        ({"train_weights": [(1, {"caves": 1.0})]}, r"must start at step 0 and increase; they start at \[1\]"),
        ({"train_weights": [(0, {"caves": 1.0}), (4, {"clubs": 0.0})]}, "at step 4 must be positive or zero"),
        (
            {"train_weights": {"caves": 1.0, "clubs": 0.1}},
            r"'clubs' a share of 0\.0909.*mixture_block_size to at least 11",
        ),
        ({"mixture_block_size": 0}, r"data\.mixture_block_size=0 must lie in"),
        ({"components": {}, "train_weights": None}, r"data\.components is empty"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(small_corpus: LmDataConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _build(replace(small_corpus, **changes))


def test_a_component_of_less_than_one_sequence_is_named(small_corpus: LmDataConfig) -> None:
    tokens = small_corpus.build_caches("train")["clubs"].flat_field_length("input_ids")
    with pytest.raises(ValueError, match=rf"component 'clubs' holds {tokens} tokens, less than one sequence of 5000"):
        build_train_dataset(
            small_corpus, Axis("position", 5000), jax.random.key(0), batch_schedule=BatchSchedule(4), vocab_size=VOCAB
        )


def _examples(number: int) -> list[GrugLmExample]:
    tokens = np.arange(number * POS.size, dtype=np.int32).reshape(number, POS.size) % VOCAB
    return [GrugLmExample.causal(jax.numpy.asarray(row)) for row in tokens]


def _direct(dataset: AsyncDataset[GrugLmExample], **changes: Any) -> LmDataConfig:
    components: dict[str, DatasetComponentBase] = {"mine": DirectDatasetComponent(datasets={"train": dataset})}
    return LmDataConfig(components=components, shuffle=False, mixture_block_size=4, **changes)


def test_a_state_knows_its_next_batch(small_corpus: LmDataConfig) -> None:
    _, loader = _build(small_corpus)
    assert _bytes(batch_at(loader, jax.numpy.asarray(3, np.int32))) == _bytes(batch_at(loader, 3))


def test_data_that_end_are_an_error_at_the_step(small_corpus: LmDataConfig) -> None:
    _, loader = _build(_direct(ListAsyncDataset(_examples(10)), stop_strategy="first_exhausted"))
    batches = iter_from_step(loader, 0)
    _take(batches, 2)
    with pytest.raises(ValueError, match="step 2 needs the sequences 8 to 11, but the training data end after 10"):
        next(batches)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**30])
def test_a_token_outside_the_vocabulary_is_named(small_corpus: LmDataConfig, tmp_path: Path, token: int) -> None:
    root = shutil.copytree(str(small_corpus.cache_dir), tmp_path / "cache")
    spec = {"driver": "zarr3", "kvstore": f"file://{root}/clubs/train/input_ids/data"}
    array = ts.open(spec, open=True).result()
    array[3 * POS.size + 5].write(token).result()
    cfg = replace(small_corpus, cache_dir=str(root))
    message = rf"dataset 'clubs', row 3, position 5: token id {token} is outside the vocabulary \[0, 300\)"
    _, loader = _build(cfg)
    with pytest.raises(ValueError, match=message):
        _take(iter_from_step(loader, 0), 100)


def test_a_bad_token_is_named_while_other_reads_are_under_way(small_corpus: LmDataConfig, tmp_path: Path) -> None:
    root = shutil.copytree(str(small_corpus.cache_dir), tmp_path / "cache")
    spec = {"driver": "zarr3", "kvstore": f"file://{root}/clubs/train/input_ids/data"}
    ts.open(spec, open=True).result()[POS.size : 32 * POS.size].write(VOCAB).result()
    cfg = replace(small_corpus, cache_dir=str(root), train_weights={"clubs": 0.5, "caves": 0.5}, mixture_block_size=8)
    _, loader = _build(replace(cfg, shuffle=False), 8)
    for _ in range(100):
        with pytest.raises(ValueError, match=r"dataset 'clubs', row \d+, position 0: token id 300 is outside"):
            batch_at(loader, 1)


def test_a_model_with_a_smaller_vocabulary_than_the_tokenizer_is_found(small_corpus: LmDataConfig) -> None:
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 40\)"):
        _build(small_corpus, vocab_size=40)


class _Failing(AsyncDataset[GrugLmExample]):
    """Raises at one index."""

    def __init__(self, error: BaseException, index: int) -> None:
        self.error = error
        self.index = index

    @override
    async def async_len(self) -> int:
        raise NotImplementedError

    @override
    def is_finite(self) -> bool:
        return False

    @override
    async def get_batch(self, indices: Sequence[int]) -> Sequence[GrugLmExample]:
        if self.index in indices:
            raise self.error
        return _examples(1) * len(indices)


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("grug-data")]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), OSError("gone"), SystemExit("killed")])
def test_what_goes_wrong_in_the_thread_is_raised_at_its_step(error: BaseException) -> None:
    _, loader = _build(_direct(_Failing(error, 10)))
    batches = iter_from_step(loader, 0)
    _take(batches, 2)
    with pytest.raises(type(error), match=str(error)):
        next(batches)
    assert _threads() == []


def test_closing_ends_the_thread(small_corpus: LmDataConfig) -> None:
    _, loader = _build(small_corpus)
    batches = iter_from_step(loader, 0)
    next(batches)
    assert len(_threads()) == 1
    batches.close()
    assert _threads() == []


def test_closing_does_not_wait_for_a_fetch_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, released = threading.Event(), threading.Event()

    class _Stuck(_Failing):
        @override
        async def get_batch(self, indices: Sequence[int]) -> Sequence[GrugLmExample]:
            if 4 in indices:
                stuck.set()
                released.wait()
            return await super().get_batch(indices)

    monkeypatch.setattr(data, "_CLOSE_SECONDS", 0.01)
    monkeypatch.setattr(data, "_SLOW_SECONDS", 0.01)
    _, loader = _build(_direct(_Stuck(ValueError(), -1)))
    batches = iter_from_step(loader, 0)
    next(batches)
    assert stuck.wait(timeout=30)
    batches.close()
    assert len(_threads()) == 1
    released.set()


def test_closing_leaves_a_read_under_way(small_corpus: LmDataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorStore's read is not cancelled: the thread waits for it, and then ends."""
    promise, late = ts.Promise[Any].new()
    calls, begun = count(), threading.Event()
    read = CachedArray.read

    def read_slowly(
        self: CachedArray, starts: np.ndarray, stops: np.ndarray, futures: list[ts.Future[Any]]
    ) -> Callable[[], np.ndarray]:
        if next(calls) > 0:
            futures.append(late)
            begun.set()
        return read(self, starts, stops, futures)

    monkeypatch.setattr(data, "_CLOSE_SECONDS", 0.01)
    _, loader = _build(replace(small_corpus, train_weights={"clubs": 1.0}))
    monkeypatch.setattr(CachedArray, "read", read_slowly)
    batches = iter_from_step(loader, 0)
    next(batches)
    assert begun.wait(timeout=30)
    batches.close()
    [thread] = [thread for thread in threading.enumerate() if thread.name == "grug-data"]
    promise.set_result(None)
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_slow_batch_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    class _Slow(_Failing):
        @override
        async def get_batch(self, indices: Sequence[int]) -> Sequence[GrugLmExample]:
            if 4 in indices:
                released.wait()
            return await super().get_batch(indices)

    class _Release(logging.Handler):
        @override
        def emit(self, record: logging.LogRecord) -> None:
            released.set()

    monkeypatch.setattr(data, "_SLOW_SECONDS", 0.01)
    _, loader = _build(_direct(_Slow(ValueError(), -1)))
    batches = iter_from_step(loader, 0)
    next(batches)
    handler = _Release()
    data.logger.addHandler(handler)
    try:
        next(batches)
    finally:
        data.logger.removeHandler(handler)
        batches.close()
    assert "still waiting for the batch of step 1" in caplog.text


def test_batches_are_fetched_ahead(small_corpus: LmDataConfig) -> None:
    fetched: list[int] = []
    enough = threading.Event()

    class _Watched(_Failing):
        @override
        async def get_batch(self, indices: Sequence[int]) -> Sequence[GrugLmExample]:
            fetched.extend(indices)
            if 15 in indices:
                enough.set()
            return await super().get_batch(indices)

    _, loader = _build(_direct(_Watched(ValueError(), -1)))
    batches = iter_from_step(loader, 0)
    next(batches)
    assert enough.wait(timeout=30)  # three more batches, without having been asked for
    batches.close()
    assert max(fetched) == 15


def test_prefetch_must_be_positive(small_corpus: LmDataConfig) -> None:
    dataset, loader = _build(small_corpus)
    with pytest.raises(ValueError, match="prefetch=0"):
        build_train_loader(dataset, loader.mesh, 4, prefetch=0)


def test_checked_dataset_passes_good_sequences_through() -> None:
    examples = _examples(3)
    checked = VocabCheckedDataset(dataset=ListAsyncDataset(examples), name="x", vocab_size=VOCAB).as_sync_dataset()
    assert len(checked) == 3
    assert checked.get_batch([2, 0])[0] is examples[2]
    assert checked.get_batch([]) == []
