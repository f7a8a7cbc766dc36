from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from haliax import Axis
from haliax.partitioning import ResourceMapping
from jax import Array
from jax.sharding import Mesh
from levanter.callbacks import StepInfo
from levanter.data.dataset import AsyncDataset
from levanter.data.loader import DataLoader
from levanter.tokenizers import MarinTokenizer

Ex = TypeVar("Ex")
M = TypeVar("M")
T = TypeVar("T")

tqdm: Callable[..., Iterable[Any]]

type LossFnOutput = tuple[Array, Array, Array]

@dataclass
class EvalResult:
    micro_avg_loss: float
    macro_avg_loss: float
    tag_macro_losses: dict[str, float]
    tag_micro_losses: dict[str, float]
    total_eval_loading_time: float
    micro_bpb: float | None = None
    macro_bpb: float | None = None
    tag_macro_bpb: dict[str, float] | None = None
    tag_micro_bpb: dict[str, float] | None = None

class DomainTaggedDataset(AsyncDataset[tuple[T, Array]], Generic[T]):
    tag_to_index: dict[str, int]
    def __init__(
        self, datasets: Sequence[tuple[AsyncDataset[T], Sequence[str]]], max_examples_per_dataset: int | None = None
    ) -> None: ...
    @property
    def tags(self) -> Sequence[str]: ...

class TaggedEvaluator(Generic[Ex, M]):
    loss_fn: Callable[[M, Any], LossFnOutput]
    dataset: DomainTaggedDataset[Ex]
    loader: DataLoader[tuple[Ex, Array]]
    device_mesh: Mesh | None
    tokenizer: MarinTokenizer | None
    axis_mapping: ResourceMapping | None
    bytes_per_token: Array | None
    hierarchy: dict[str, list[int]]
    accum_for_batch: Callable[..., Any]
    def __init__(
        self,
        EvalBatch: Axis | int,
        tagged_eval_sets: Sequence[tuple[AsyncDataset[Ex], Sequence[str]]],
        loss_fn: Callable[[M, Any], LossFnOutput],
        tokenizer: MarinTokenizer | None = None,
        device_mesh: Mesh | None = None,
        axis_mapping: ResourceMapping | None = None,
        max_examples_per_dataset: int | None = None,
        shuffle: bool = False,
    ) -> None: ...
    def evaluate(self, model: M) -> EvalResult: ...

def eval_model(evaluator: TaggedEvaluator[Ex, M], model: M, prefix: str = "") -> dict[str, float]: ...
def construct_log_dict(
    evaluator: TaggedEvaluator[Any, Any], eval_result: EvalResult, total_time: float, prefix: str
) -> dict[str, float]: ...
def cb_tagged_evaluate(
    evaluator: TaggedEvaluator[Any, Any],
    *,
    prefix: str = "eval",
    eval_current: bool = True,
    eval_ema: bool = True,
) -> Callable[[StepInfo[Any]], None]: ...
def cb_tagged_lm_evaluate(
    EvalBatch: Axis,
    tagged_eval_sets: Sequence[tuple[AsyncDataset[Ex], Sequence[str]]],
    tokenizer: MarinTokenizer | None = None,
    device_mesh: Mesh | None = None,
    axis_mapping: ResourceMapping | None = None,
    max_examples_per_dataset: int | None = None,
    eval_current: bool = True,
    eval_ema: bool = True,
    prefix: str = "eval",
    mp: Any = None,
    checkpoint_path: str | None = None,
    loss_fn: Callable[[Any, Ex], LossFnOutput] | None = None,
) -> Callable[[StepInfo[Any]], None]: ...
