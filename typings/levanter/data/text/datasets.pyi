from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypedDict

import draccus
import numpy as np
from haliax import Axis
from jax import Array
from levanter.data.dataset import AsyncDataset
from levanter.data.mixture import MixtureDataset
from levanter.data.packing import GreedyPrepackedDataset
from levanter.data.sharded_datasource import ShardedDataSource
from levanter.data.text.examples import GrugLmExample
from levanter.data.text.formats import LmDatasetFormatBase, TextLmDatasetFormat
from levanter.models.lm_model import LmExample
from levanter.schedule import BatchSchedule, IntSchedule
from levanter.store.cache import CacheOptions, TreeCache
from levanter.tokenizers import MarinTokenizer

class TokenSeqDict(TypedDict):
    input_ids: np.ndarray

class TokenSeqDataset(AsyncDataset[TokenSeqDict]):
    doc_cache: TreeCache[dict[str, np.ndarray]]
    seq_len: int
    loss_weights_key: str | None
    def __init__(
        self, doc_cache: TreeCache[dict[str, np.ndarray]], seq_len: int, loss_weights_key: str | None = None
    ) -> None: ...

class _MappedLmDataset(AsyncDataset[GrugLmExample]):
    async def async_len(self) -> int: ...
    def is_finite(self) -> bool: ...
    async def get_batch(self, indices: Sequence[int]) -> Sequence[GrugLmExample]: ...

class CausalLmDataset(_MappedLmDataset):
    dataset: AsyncDataset[TokenSeqDict]
    eos_id: int | None
    block_cross_document_attention: bool

class PackedTokenDataset(_MappedLmDataset):
    packed: GreedyPrepackedDataset
    Pos: Axis
    block_cross_document_attention: bool
    loss_weights_key: str | None

class ChatDataset(_MappedLmDataset):
    packed: GreedyPrepackedDataset
    Pos: Axis
    block_cross_document_attention: bool
    mask_user_turns: bool

class PrebuiltLmDataset(_MappedLmDataset):
    dataset: AsyncDataset[dict[str, np.ndarray]]
    eos_id: int | None
    block_cross_document_attention: bool
    input_ids_key: str
    loss_weights_key: str | None
    loss_weight_transform: Callable[[np.ndarray], np.ndarray]

def dataset_for_component(
    component: DatasetComponent,
    Pos: Axis,
    cache: TreeCache[dict[str, np.ndarray]],
    *,
    eos_id: int | None,
    block_cross_document_attention: bool,
) -> AsyncDataset[GrugLmExample]: ...

class NamedLmDataset(AsyncDataset[LmExample]):
    dataset: AsyncDataset[GrugLmExample]
    Pos: Axis
    def __init__(self, dataset: AsyncDataset[GrugLmExample], Pos: Axis) -> None: ...

@dataclass(frozen=True)
class LmDatasetSourceConfigBase(draccus.ChoiceRegistry):
    tags: list[str] | None = None
    cache_dir: str | None = None
    format: LmDatasetFormatBase = field(default_factory=TextLmDatasetFormat)
    def get_shard_source(self, split: str) -> ShardedDataSource | None: ...

@dataclass(frozen=True)
class HfDatasetSourceConfig(LmDatasetSourceConfigBase):
    id: str = field(kw_only=True)
    name: str | None = None
    revision: str | None = None
    stream: bool = True
    splits: list[str] | None = None

@dataclass(frozen=True)
class UrlDatasetSourceConfig(LmDatasetSourceConfigBase):
    train_urls: list[str] = field(default_factory=list[str])
    validation_urls: list[str] = field(default_factory=list[str])
    def urls_for_split(self, split: str) -> list[str]: ...

@dataclass(frozen=True)
class DatasetComponentBase(draccus.ChoiceRegistry): ...

@dataclass(frozen=True)
class DatasetComponent(DatasetComponentBase):
    source: LmDatasetSourceConfigBase | None = None
    cache_dir: str | None = None
    format: LmDatasetFormatBase = field(default_factory=TextLmDatasetFormat)
    pack: bool | int | None = None
    tags: list[str] | None = None
    split: str = "validation"
    flat_cache: bool = False

@dataclass(frozen=True)
class DirectDatasetComponent(DatasetComponentBase):
    datasets: Mapping[str, AsyncDataset[GrugLmExample]]
    tags: list[str] | None = None

@dataclass(frozen=True)
class ConcatDatasetComponent(DatasetComponentBase):
    children: dict[str, DatasetComponent]
    tags: list[str] | None = None

@dataclass(frozen=True)
class BlockShuffleConfig:
    io_block_size: int
    window_blocks: int
    perm_type: Literal["feistel", "linear"] = "feistel"

@dataclass(frozen=True)
class ContextPhaseConfig:
    end_step: int
    seq_len: int
    batch_size: int | IntSchedule
    train_weights: list[tuple[int, dict[str, float]]]
    shuffle: BlockShuffleConfig

DEFAULT_LM_DATA_SHUFFLE: BlockShuffleConfig

@dataclass(frozen=True)
class LmDataConfig:
    tokenizer: str = "gpt2"
    vocab_size: int | None = None
    cache_dir: str | None = "cache/"
    cache_catalog: str | None = None
    cache_options: CacheOptions = field(default_factory=CacheOptions)
    enforce_eos: bool = True
    auto_build_caches: bool = True
    chat_template: str | None = None
    shuffle: bool | BlockShuffleConfig = ...
    permutation_type: Literal["feistel", "linear"] = "feistel"
    block_cross_document_attention: bool = True
    components: dict[str, DatasetComponentBase] = field(default_factory=dict[str, DatasetComponentBase])
    train_weights: dict[str, float] | list[tuple[int, dict[str, float]]] | None = None
    stop_strategy: str = "restart"
    target_budget: int | None = None
    experiment_budget: int | None = None
    mixture_block_size: int = 2048
    max_train_batches: dict[str, int] | None = None
    num_validation_sequences: dict[str, int] | None = None
    shuffle_before_trainval_split: bool = True
    prior_context_phases: list[ContextPhaseConfig] = field(default_factory=list[ContextPhaseConfig])
    @cached_property
    def the_tokenizer(self) -> MarinTokenizer: ...
    def build_token_datasets(
        self, caches: Mapping[str, TreeCache[dict[str, np.ndarray]]], Pos: Axis, *, split: str
    ) -> dict[str, AsyncDataset[GrugLmExample]]: ...
    def train_set(self, Pos: Axis, batch_schedule: BatchSchedule, *, key: Array) -> AsyncDataset[LmExample]: ...
    def train_mixture(
        self, Pos: Axis, batch_schedule: BatchSchedule, *, key: Array
    ) -> MixtureDataset[GrugLmExample]: ...
    def train_sets(
        self, Pos: Axis, *, initial_batch_size: int | None = None, key: Array
    ) -> Mapping[str, AsyncDataset[GrugLmExample]]: ...
    def validation_sets(self, Pos: Axis) -> Mapping[str, AsyncDataset[LmExample]]: ...
    def build_caches(self, split: str) -> dict[str, TreeCache[dict[str, np.ndarray]]]: ...
    @property
    def sources(self) -> Mapping[str, LmDatasetSourceConfigBase]: ...
    def tagged_eval_sets(self, Pos: Axis) -> list[tuple[AsyncDataset[LmExample], list[str]]]: ...
