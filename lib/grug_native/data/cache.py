"""What is on disk under an `LmDataConfig`: are its token caches whole, and which data are they?

TensorStore answers a read from a shard file that is gone with zeros, and levanter takes a cache's length from the
arrays, so a damaged cache is otherwise a shorter or an emptier dataset, and no error.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
import tensorstore as ts
from levanter.data.text.datasets import (
    ConcatDatasetComponent,
    DatasetComponent,
    DatasetComponentBase,
    LmDataConfig,
    UrlDatasetSourceConfig,
)
from levanter.data.text.formats import TextLmDatasetFormat, preprocessor_for_format
from levanter.store.cache import CACHE_LAYOUT_SHARDED, LEDGER_FILE_NAME, CacheCatalog, CacheLedger, TreeCache
from levanter.tensorstore_serialization import build_kvstore_spec
from levanter.utils.thread_utils import blocking_wait
from rigging.filesystem.storage_path import StoragePath

from grug_native.data.corpus_store import RECORD_FILE
from grug_native.data.text_tokens import EOS_FOLLOWS_TEXT
from grug_native.data.vocabulary import check_vocabulary, record_vocabulary, tokenizer_digest
from grug_native.host.shell import offer

type Split = Literal["train", "validation"]

_SAMPLES = 64
_SAMPLE_TOKENS = 16_384
"""A fingerprint reads this many evenly spaced windows of this many tokens: all of a cache of up to a million."""

_BATCH_FIELDS = (
    "train_weights",
    "mixture_block_size",
    "stop_strategy",
    "shuffle",
    "permutation_type",
    "enforce_eos",
    "block_cross_document_attention",
    "chat_template",
    "target_budget",
    "experiment_budget",
    "max_train_batches",
    "num_validation_sequences",
    "shuffle_before_trainval_split",
)
"""The fields of `LmDataConfig` that change batches without changing a cache."""

logger = logging.getLogger(__name__)


def wait_for[T](reads: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that reads caches, and if it fails, waits for the reads that it leaves under way.

    An event loop cancels those as it closes, and to cancel a read of TensorStore (0.1.84) can hang the process: the
    caller keeps the interpreter's lock while it waits for a callback that needs it.
    """

    async def run() -> T:
        try:
            return await reads
        finally:
            if left := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(left)

    return blocking_wait(run())


def cache_parts(name: str, component: DatasetComponentBase) -> Iterator[tuple[str, DatasetComponent]]:
    """Yields the cache-backed parts of a component under the names that `LmDataConfig.build_caches` gives them."""
    if isinstance(component, ConcatDatasetComponent):
        for child_name, child in component.children.items():
            yield f"{name}/{child_name}", child
    elif isinstance(component, DatasetComponent):
        yield name, component


def token_field(component: DatasetComponent) -> str:
    """Returns the name of the cached array that holds the component's token ids."""
    return component.format.token_data_key


def verify_caches(cfg: LmDataConfig, splits: tuple[Split, ...] = ("train", "validation")) -> None:
    """Checks that every token cache is whole: ledger, array lengths, and each shard file up to its end.

    Reads one chunk of each shard file, never all of it. A cache that levanter has yet to build is passed over.
    A corpus of an older version is as good as a new one, and is named in the log; and so are caches made by a tokenizer
    that is no longer to be had for a comparison.

    Raises:
        ValueError: names the component, the file and the way out; also where another tokenizer made a cache.
    """
    older: set[Path] = set()
    unknown: list[str] = []
    for split in splits:
        for name, component in cfg.components.items():
            for part, cached in cache_parts(name, component):
                path = _cache_path(cfg, part, cached, split)
                if path is None or not _should_exist(cfg, cached, path, split):
                    continue
                if not StoragePath(path).exists():
                    raise ValueError(
                        f"component {part!r}, {split} split: there is no token cache {path}. {_way_back(cfg, path)}"
                    )
                try:
                    wait_for(_verify_cache(cfg, cached, path))
                except (OSError, ValueError, KeyError) as error:
                    raise ValueError(
                        f"component {part!r}, {split} split: the token cache {path} is damaged: {error}\n"
                        f"{_way_out(cfg, path)}"
                    ) from error
                corpus, made = _corpus_of(path), CacheLedger.load(path).metadata.preprocessor_metadata or {}
                try:
                    if not check_vocabulary(cfg, path, made.get("tokenizer"), corpus):
                        unknown.append(f"{part} ({split})")
                except ValueError as error:
                    raise ValueError(f"component {part!r}, {split} split: {error}") from error
                if corpus is not None and _space_before_eos(cfg, cached, path):
                    older.add(corpus)
    for corpus in sorted(older):
        logger.warning(
            "the corpus %s is of an older version: each of its documents ends in a space that its text does not have. "
            "It is read as it is; a corpus that is made anew has no such space",
            corpus,
        )
    if unknown:
        logger.warning(
            "the token caches of %s were made by a tokenizer of another name than data.tokenizer=%s, which is not to "
            "be had for a comparison: they are read as if this one had made them",
            ", ".join(unknown),
            cfg.tokenizer,
        )


def build_train_caches(cfg: LmDataConfig) -> dict[str, TreeCache[dict[str, np.ndarray]]]:
    """The training split's `build_caches` of levanter. What that makes is recorded as made by the config's tokenizer.

    Raises:
        ValueError, FileNotFoundError: if a cache is not there and cannot be built.
    """
    unmade = unmade_caches(cfg)
    caches = cfg.build_caches("train")
    if jax.process_index() == 0:
        for name in unmade:
            record_vocabulary(caches[name].cache_dir, cfg.the_tokenizer)
    return caches


def spaces_before_eos(cfg: LmDataConfig, name: str, split: Split) -> bool:
    """Whether each document of a component ends in a space that its text does not have: in levanter's caches of texts.

    Its `BatchTokenizer` tokenizes the text, a space, and the spelling of EOS. The caches have to be there.
    """
    paths = [(part, _cache_path(cfg, name, part, split)) for name, part in cache_parts(name, cfg.components[name])]
    return any(path is not None and _space_before_eos(cfg, part, path) for part, path in paths)


def _space_before_eos(cfg: LmDataConfig, component: DatasetComponent, path: str) -> bool:
    if not isinstance(component.format, TextLmDatasetFormat) or not StoragePath(f"{path}/{LEDGER_FILE_NAME}").exists():
        return False
    if StoragePath(f"{path}/{EOS_FOLLOWS_TEXT}").exists():
        return False
    made = CacheLedger.load(path).metadata.preprocessor_metadata
    if made is None:
        made = preprocessor_for_format(component.format, cfg.the_tokenizer, enforce_eos=cfg.enforce_eos).metadata
    return bool(made.get("append_eos"))


def unmade_caches(cfg: LmDataConfig) -> list[str]:
    """Returns the names of the training caches that levanter has yet to build."""
    paths = {
        part: (cached, _cache_path(cfg, part, cached, "train"))
        for name, component in cfg.components.items()
        for part, cached in cache_parts(name, component)
    }
    return [
        part
        for part, (cached, path) in paths.items()
        if path is not None and cfg.auto_build_caches and not _should_exist(cfg, cached, path, "train")
    ]


def _corpus_of(path: str) -> Path | None:
    return next((folder for folder in Path(path).parents if (folder / RECORD_FILE).is_file()), None)


def _way_back(cfg: LmDataConfig, path: str) -> str:
    if _corpus_of(path) is not None:
        return _way_out(cfg, path)
    build = "" if cfg.auto_build_caches else ", or set data.auto_build_caches=true to have it built from its source"
    return (
        "If it lies elsewhere now, put it back beside the run, or give its place in data.cache_dir (and data.tokenizer)"
        f"{build}."
    )


def _way_out(cfg: LmDataConfig, path: str) -> str:
    if (corpus := _corpus_of(path)) is not None:
        return f"Delete the folder of its corpus, {corpus}, to have all of it made anew."
    if cfg.auto_build_caches:
        return "Delete that folder (or restore it) to have the cache built anew."
    build = offer("data.auto_build_caches", "true")
    return f"Restore that folder; or delete it, and give {build} to have the cache built anew."


def _cache_path(cfg: LmDataConfig, part: str, component: DatasetComponent, split: Split) -> str | None:
    if cfg.cache_catalog is not None:
        entry = CacheCatalog.load(cfg.cache_catalog).entry(split, part)
        return None if entry is None else entry.cache_dir
    if component.cache_dir is None and cfg.cache_dir is None:
        raise ValueError(f"component {part!r} has no place for its token cache: set data.cache_dir")
    root = component.cache_dir or str(StoragePath.parse(str(cfg.cache_dir)) / part)
    if component.flat_cache:
        return root if split == "train" else None
    return str(StoragePath.parse(root) / split)


def _should_exist(cfg: LmDataConfig, component: DatasetComponent, path: str, split: Split) -> bool:
    """Whether levanter would load, and not build or pass over, the cache at `path`."""
    if StoragePath(f"{path}/{LEDGER_FILE_NAME}").exists():
        return True
    source = component.source
    if isinstance(source, UrlDatasetSourceConfig) and not source.urls_for_split(split):
        return StoragePath(path).exists()
    if source is not None and cfg.auto_build_caches:
        return False
    return split == "train" or source is not None or StoragePath(path).exists()


async def _verify_cache(cfg: LmDataConfig, component: DatasetComponent, path: str) -> None:
    ledger = CacheLedger.load(path)
    if not ledger.is_finished:
        raise ValueError(f"{path}/{LEDGER_FILE_NAME} says that the build never finished")
    expected = preprocessor_for_format(component.format, cfg.the_tokenizer, enforce_eos=cfg.enforce_eos).metadata
    found = ledger.metadata.preprocessor_metadata or expected
    for key in sorted((expected.keys() & found.keys()) - {"tokenizer"}):
        if found[key] != expected[key]:
            raise ValueError(f"it was built with {key}={found[key]!r}, and the data config wants {expected[key]!r}")
    if ledger.layout == CACHE_LAYOUT_SHARDED:
        shards = {
            f"{path}/{shard}": (ledger.shard_rows[shard], ledger.field_counts_by_shard.get(shard, {}))
            for shard in ledger.finished_shards
        }
    else:
        shards = {path: (ledger.total_num_rows, ledger.field_counts)}
    await asyncio.gather(
        *(
            _verify_array(f"{shard}/{field}", rows, size)
            for shard, (rows, sizes) in shards.items()
            for field, size in sizes.items()
        )
    )


async def _verify_array(path: str, rows: int, size: int) -> None:
    """Checks a jagged array: `offsets[0]` counts its rows, and `offsets[rows]` its values."""
    offsets, data = await asyncio.gather(_open_array(f"{path}/offsets"), _open_array(f"{path}/data"))
    found_rows, found_size = int(await offsets[0].read()), int(await offsets[rows].read())
    if (found_rows, found_size) != (rows, size):
        raise ValueError(
            f"{path} holds {found_rows} rows and {found_size} values, and the ledger says {rows} and {size}"
        )
    for array, length in ((offsets, rows + 1), (data, size)):
        [shard] = cast(tuple[int], array.chunk_layout.write_chunk.shape)
        ends = range(shard, length + shard, shard)
        await asyncio.gather(*(array[min(end, length) - 1].read() for end in ends))


async def _open_array(path: str) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": build_kvstore_spec(path), "fill_missing_data_reads": False}
    return await ts.open(spec, open=True, read=True)


def data_fingerprint(cfg: LmDataConfig) -> dict[str, str]:
    """Identifies the training data: with equal fingerprints and keys, equal batches.

    Returns:
        One hex digest for each of `component/<name>` (ledger, and a sample of the tokens; all of them up to a
        million), `tokenizer`, and `config` (the fields and the order of components that decide the batches).

    Raises:
        ValueError, FileNotFoundError: if a cache is not there and cannot be built.
    """
    caches = cfg.build_caches("train")
    components: list[tuple[str, DatasetComponent]] = [
        part for name, component in cfg.components.items() for part in cache_parts(name, component)
    ]
    digests = {
        f"component/{name}": _component_digest(caches[name], token_field(component))
        for name, component in components
        if name in caches
    }
    fields: dict[str, object] = {name: getattr(cfg, name) for name in _BATCH_FIELDS}
    fields["order"] = list(cfg.components)
    fields["formats"] = [
        (name, type(component.format).__name__, component.format, component.pack) for name, component in components
    ]
    return digests | {"tokenizer": tokenizer_digest(cfg), "config": _json_digest(fields)}


def _component_digest(cache: TreeCache[dict[str, np.ndarray]], field: str) -> str:
    ledger = cache.ledger
    metadata = {k: v for k, v in (ledger.metadata.preprocessor_metadata or {}).items() if k != "tokenizer"}
    size = cache.flat_field_length(field)
    # Evenly spaced from the first token to the last; they touch when there are few tokens.
    windows = np.unique(np.linspace(0, max(size - _SAMPLE_TOKENS, 0), _SAMPLES, dtype=np.int64))

    async def read() -> list[np.ndarray]:
        return list(await cache.get_flat_field_batch(field, windows.tolist(), min(_SAMPLE_TOKENS, size)))

    tokens = hashlib.sha256()
    for window in wait_for(read()):
        tokens.update(np.asarray(window, dtype="<i8").tobytes())
    rows = [ledger.shard_rows[shard] for shard in ledger.finished_shards]
    return _json_digest([ledger.total_num_rows, rows, ledger.field_counts, metadata, tokens.hexdigest()])


def _json_digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: object) -> object:
    """Spells what JSON cannot: a dataclass by its fields, a function by its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Callable):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"cannot fingerprint {value!r}")
