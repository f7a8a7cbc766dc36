"""From an `LmDataConfig` to global batches on the devices: levanter's caches, mixtures and loader, checked on the way.

Batch `t` is a pure function of (data, data config, seed, `t`): nothing here has a position to save or to restore.
Importing this module imports levanter's data stack, which takes seconds; nothing light may import it.
"""

import dataclasses
import logging
import operator
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, wait
from itertools import count
from queue import SimpleQueue
from threading import Thread
from typing import SupportsIndex

import jax
import numpy as np
from haliax import Axis
from haliax.partitioning import physical_axis_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray
from levanter.data.dataset import AsyncDataset
from levanter.data.loader import DataLoader
from levanter.data.mixture import MixtureDataset
from levanter.data.text.datasets import DirectDatasetComponent, LmDataConfig
from levanter.data.text.examples import GrugLmExample
from levanter.schedule import BatchSchedule, IntSchedule
from levanter.store.cache import TreeCache
from levanter.utils.thread_utils import blocking_wait

from grug_native.data.cache import build_train_caches, cache_parts, token_field, verify_caches
from grug_native.data.mixture import check_mixture
from grug_native.data.row_order import BatchReader
from grug_native.data.vocabulary_check import VocabCheckedDataset
from grug_native.host.fault_injection import fault_point
from grug_native.host.shell import offer
from grug_native.sharding import BATCH_AXES

BATCH_AXIS = "__BATCH__"
"""Name of the batch axis in the axis mapping of a loader, as levanter's grug code spells it."""

_DEFAULT_PREFETCH = 4
_SLOW_SECONDS = 30
_CLOSE_SECONDS = 5

logger = logging.getLogger(__name__)


def build_train_dataset(
    cfg: LmDataConfig, Pos: Axis, key: PRNGKeyArray, *, batch_schedule: BatchSchedule, vocab_size: int
) -> MixtureDataset[GrugLmExample]:
    """Builds the training mixture, and what token caches it lacks.

    Args:
        cfg: components, weights (staged ones in training steps), shuffling.
        Pos: the position axis; its size is the sequence length in tokens.
        key: decides the shuffling and the order of the mixture.
        batch_schedule: sequences per step; turns the steps of the weight stages into sequences.
        vocab_size: of the model. A token id outside it is an error as soon as its sequence is read.

    Raises:
        ValueError: if the mixture cannot be what the config says, a cache is damaged, or a component has less than
            one sequence.
    """
    if cfg.prior_context_phases:
        raise ValueError(
            "data.prior_context_phases continues a run of another sequence length, which a GrugRunner never does: "
            "leave it empty"
        )
    check_mixture(cfg.train_weights, cfg.mixture_block_size, batch_schedule.global_data_offset_by_step)
    verify_caches(cfg)
    caches = build_train_caches(cfg)
    datasets = cfg.build_token_datasets(caches, Pos, split="train")
    for name, dataset in datasets.items():
        if dataset.is_finite() and blocking_wait(dataset.async_len()) == 0:
            raise ValueError(
                f"component {name!r} holds {_count_tokens(cfg, caches, name)} tokens, less than one sequence of "
                f"{Pos.size}: lower model.max_seq_len, add text, or give it weight 0 in data.train_weights"
            )
    # As direct components they go through levanter's own shuffling and mixing, and the check sees unshuffled rows.
    checked = {
        name: DirectDatasetComponent(
            datasets={"train": VocabCheckedDataset(dataset=dataset, name=name, vocab_size=vocab_size)}
        )
        for name, dataset in datasets.items()
    }
    unused = {name: component for name, component in cfg.components.items() if name not in checked}
    return dataclasses.replace(cfg, components=checked | unused).train_mixture(Pos, batch_schedule, key=key)


def _count_tokens(cfg: LmDataConfig, caches: Mapping[str, TreeCache[dict[str, np.ndarray]]], name: str) -> int:
    return sum(
        caches[part].flat_field_length(token_field(component))
        for part, component in cache_parts(name, cfg.components[name])
        if part in caches
    )


def mixture_metrics(
    dataset: MixtureDataset[GrugLmExample], batch_schedule: BatchSchedule, step: int
) -> dict[str, float]:
    """Returns the mixture's weights (normalised to sum 1) and stage at a training step, under levanter's names.

    A component that is absent from the stage has weight 0, so that its curve does not end in mid-air.
    """
    first = batch_schedule.global_data_offset_by_step(step)
    stage = max(index for index, (start, _) in enumerate(dataset.weight_stages) if start <= first)
    weights = dataset.weight_stages[stage][1]
    shares = {f"mixture/weight/{name}": float(weights.get(name, 0.0)) for name in dataset.dataset_index}
    return shares | {"mixture/stage": float(stage)}


def build_train_loader(
    dataset: AsyncDataset[GrugLmExample],
    mesh: Mesh,
    batch_size: int | IntSchedule,
    axis_mapping: Mapping[str, str | tuple[str, ...]] | None = None,
    *,
    prefetch: int = _DEFAULT_PREFETCH,
) -> DataLoader[GrugLmExample]:
    """Makes levanter's loader: which sequences make which batch, and how they lie on the mesh.

    Args:
        dataset: sequences by their global index.
        mesh: the mesh on which batches are laid out.
        batch_size: sequences per step, or a schedule of them.
        axis_mapping: mesh axes of the `"__BATCH__"` axis; by default the data-parallel ones.
        prefetch: batches that `iter_from_step` keeps ready on the devices.

    Raises:
        ValueError: if `prefetch` is not positive, or a batch size does not divide over the devices.
    """
    if prefetch < 1:
        raise ValueError(f"prefetch={prefetch} must be at least 1 batch")
    return DataLoader(
        BatchReader(dataset),
        batch_size,
        batch_axis_name=BATCH_AXIS,
        max_buffered_batches=prefetch,
        mesh=mesh,
        axis_resources={BATCH_AXIS: BATCH_AXES} if axis_mapping is None else axis_mapping,
        fetch_batch_size=1,
        pad_final_batch=False,
    )


def batch_at(loader: DataLoader[GrugLmExample], step: SupportsIndex) -> GrugLmExample:
    """Fetches the global batch of a training step, such as a state's `step`, and lays it out on the loader's mesh.

    Every leaf has a leading batch axis. Each process reads only the sequences that its own devices need.

    Raises:
        ValueError: if the step is negative, or the data end before it does (only with a `stop_strategy` other than
            "restart").
    """
    step = operator.index(step)
    if step < 0:
        raise ValueError(f"step={step} must not be negative")
    reader = loader.data_store
    assert isinstance(reader, BatchReader), "the loader is not of build_train_loader"
    size = loader.scheduler.batch_size_at_step(step)
    first = loader.scheduler.global_data_offset_by_step(step)
    if reader.length is not None and first + size > reader.length:
        raise ValueError(
            f"step {step} needs the sequences {first} to {first + size - 1}, but the training data end after "
            f"{reader.length}: train fewer steps, or give {offer('data.stop_strategy', 'restart')}"
        )
    local = loader.local_data_indices_by_device_for_step(step).values()
    rows = sorted({row for device_rows in local for row in device_rows})
    batch = reader.read(np.array(rows, np.int64) + first)
    sharding = NamedSharding(
        loader.mesh, PartitionSpec(physical_axis_name(loader.batch_axis_name, loader.axis_resources))
    )

    def assemble(leaf: np.ndarray) -> jax.Array:
        def on_device(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(size)
            offset = rows.index(start)
            return leaf[offset : offset + stop - start]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), sharding, on_device)

    leaves, structure = jax.tree.flatten(batch)
    # The documents of the queries and those of the keys are one array.
    placed = {key: assemble(leaf) for key, leaf in {id(leaf): leaf for leaf in leaves}.items()}
    return jax.tree.unflatten(structure, [placed[id(leaf)] for leaf in leaves])


def iter_from_step(
    loader: DataLoader[GrugLmExample], start_step: int, *, interrupted: Callable[[], bool] = lambda: False
) -> Generator[GrugLmExample, None, None]:
    """Yields the batches of `start_step`, `start_step + 1`, ... without end, on the devices before they are asked for.

    One thread keeps the loader's `prefetch` batches ready. It ends when the generator is closed or dropped. What goes
    wrong in it is raised here, at the step that it concerns.

    Args:
        loader: which batches.
        start_step: the first step.
        interrupted: asked about every second while a batch is late; if it says so, the generator ends.
    """
    requests: SimpleQueue[tuple[int, Future[GrugLmExample]] | None] = SimpleQueue()
    ahead: deque[tuple[int, Future[GrugLmExample]]] = deque()
    steps = count(start_step)
    # A daemon, and not a pool's thread: a fetch that hangs must not keep the process from exiting.
    thread = Thread(target=_serve, args=(loader, requests), name="grug-data", daemon=True)
    thread.start()
    try:
        while True:
            while len(ahead) <= (loader.max_buffered_batches or 0):
                ahead.append((next(steps), Future()))
                requests.put(ahead[-1])
            step, batch = ahead.popleft()
            waited, pause = 0.0, min(1.0, _SLOW_SECONDS)
            while not wait([batch], timeout=pause).done:
                waited += pause
                if interrupted():
                    return
                if waited >= _SLOW_SECONDS:
                    logger.warning("still waiting for the batch of step %d after %d s more", step, _SLOW_SECONDS)
                    waited = 0.0
            yield batch.result()
    finally:
        for _, batch in ahead:
            batch.cancel()
        requests.put(None)
        thread.join(timeout=_CLOSE_SECONDS)


def _serve(
    loader: DataLoader[GrugLmExample], requests: "SimpleQueue[tuple[int, Future[GrugLmExample]] | None]"
) -> None:
    while (request := requests.get()) is not None:
        step, batch = request
        if batch.set_running_or_notify_cancel():
            try:
                fault_point("fetch", step, process=jax.process_index())
                batch.set_result(batch_at(loader, step))
            except BaseException as error:  # noqa: BLE001  (raised where the batch is waited for)
                batch.set_exception(error)
