"""Tagged perplexity: levanter's `TaggedEvaluator` over a model, with exact bits per byte from the same pass.

Importing this module imports levanter, which takes seconds; nothing light may import it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, final

import equinox as eqx
import jax
import jax.numpy as jnp
import levanter.eval
import numpy as np
from haliax import Axis
from haliax.partitioning import axis_mapping
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from levanter.data.dataset import AsyncDataset
from levanter.data.text.datasets import LmDataConfig, NamedLmDataset
from levanter.data.text.examples import GrugLmExample, grug_lm_example_from_named
from levanter.eval import TaggedEvaluator, eval_model
from levanter.models.lm_model import LmExample
from levanter.tokenizers import MarinTokenizer
from levanter.utils.thread_utils import blocking_wait

from grug_native.data.cache import spaces_before_eos, verify_caches
from grug_native.data.loader import VocabCheckedDataset
from grug_native.evaluation.bits_per_byte import TokenBytes, exact_metrics, token_bytes
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.host.shell import offer
from grug_native.host.signals import leave_if_told_to_stop
from grug_native.language_model import LanguageModel
from grug_native.loss import ComputeDtype, next_tokens, per_token_loss
from grug_native.sharding import BATCH_AXES, batch_shards, reshard
from grug_native.state import GrugTrainState
from grug_native.types import LmBatch

type EvalExample = GrugLmExample | LmExample
"""A sequence to evaluate on: plain arrays, or named ones."""

type TaggedSets = Sequence[tuple[AsyncDataset[EvalExample], Sequence[str]]]
"""Evaluation sets, each with its tags. `/` in a tag nests it."""

type PositionLosses = tuple[Float[Array, "B S"], Float[Array, "B S"], Int[Array, "B S"]]
"""Nats, weights and predicted token ids of a batch: what `TaggedEvaluator` wants of a loss function."""

_AXIS_MAPPING = {"batch": BATCH_AXES}
"""Mesh axes of levanter's batch axis."""

_PREFETCHED_BATCHES = 4
"""levanter's own 100 would fill the devices with tokens."""

logger = logging.getLogger(__name__)

# Its bar for each evaluation would be drawn across the one of the run.
levanter.eval.tqdm = lambda batches, *_, **__: batches


def build_eval_sets(
    data: LmDataConfig, seq_len: int, vocab_size: int
) -> list[tuple[AsyncDataset[GrugLmExample], list[str]]]:
    """Opens the validation sets of a data config, and builds what token caches they lack.

    Args:
        data: components; each one's tags are its name and its own `tags`.
        seq_len: tokens of a sequence.
        vocab_size: of the model. A token id outside it is an error as soon as its sequence is read.

    Returns:
        The sets with their tags. One with less than a sequence is left out, with a warning.

    Raises:
        ValueError: if a cache is damaged.
    """
    verify_caches(data, splits=("validation",))
    cut_from_training = data.num_validation_sequences or {}
    sets: list[tuple[AsyncDataset[GrugLmExample], list[str]]] = []
    for named, tags in data.tagged_eval_sets(Axis("position", seq_len)):
        assert isinstance(named, NamedLmDataset)
        dataset = named.dataset
        if blocking_wait(dataset.async_len()) == 0:
            logger.warning("the validation set %s has less than one sequence of %d tokens: left out", tags, seq_len)
            continue
        checked = VocabCheckedDataset(
            dataset=dataset,
            name=f"{tags[-1]} (validation)",
            vocab_size=vocab_size,
            spaces_before_eos=spaces_before_eos(
                data, tags[-1], "train" if tags[-1] in cut_from_training else "validation"
            ),
        )
        sets.append((checked, tags))
    return sets


@final
@dataclass(frozen=True, eq=False)
class _Pass:
    """What goes through `TaggedEvaluator.evaluate` as its model: the parameters, and where the exact sums are put."""

    params: LanguageModel
    sums: list[Float[Array, "B sums"]] = field(default_factory=list)


@final
@dataclass(frozen=True, eq=False)
class TaggedEval:
    """Evaluates parameters on tagged sets; made by `build_tagged_evaluator`. Compiles once, whatever the parameters."""

    evaluator: TaggedEvaluator[EvalExample, _Pass]
    """levanter's, which loads the data, averages, and names the metrics."""
    first_sequences: TaggedEvaluator[EvalExample, _Pass]
    """The same over the first sequence of each set."""
    mesh: Mesh
    """The mesh on which the parameters lie."""
    exact: bool
    """Whether there are exact bits per byte."""

    def evaluate(self, params: LanguageModel, *, prefix: str = "eval") -> dict[str, float]:
        """Returns levanter's metrics, and `<prefix>/bpb_exact`, `<prefix>/<tag>/bpb_exact`, ... beside them.

        Args:
            params: laid out over the mesh, as `init` leaves them.
            prefix: first part of each metric's name.
        """
        return self._evaluate(self.evaluator, params, prefix)

    def check_one_batch(self, params: LanguageModel) -> float:
        """Evaluates the first sequence of each set, so that an evaluation which cannot work fails within seconds.

        Returns:
            Their mean loss, in nats a token.
        """
        return self._evaluate(self.first_sequences, params, "check")["check/loss"]

    def _evaluate(
        self, evaluator: TaggedEvaluator[EvalExample, _Pass], params: LanguageModel, prefix: str
    ) -> dict[str, float]:
        one_pass = _Pass(params)
        with jax.set_mesh(self.mesh), axis_mapping(_AXIS_MAPPING):
            metrics = {name: float(value) for name, value in eval_model(evaluator, one_pass, prefix).items()}
        if not self.exact:
            return metrics
        rows = np.concatenate(jax.device_get(one_pass.sums))
        names = list(evaluator.dataset.tag_to_index)
        return metrics | exact_metrics(rows[:, 0], rows[:, 1], rows[:, 2:], names, evaluator.hierarchy, prefix=prefix)


def build_tagged_evaluator(
    sets: TaggedSets,
    *,
    batch_size: int,
    mesh: Mesh,
    vocab_size: int,
    tokenizer: MarinTokenizer | None = None,
    max_batches: int | None = None,
    compute_dtype: ComputeDtype = "float32",
) -> TaggedEval:
    """Makes the evaluation of tagged sets; no device is touched but to put a table of the vocabulary there.

    Args:
        sets: what to evaluate on, with tags; `build_eval_sets` makes them of a data config.
        batch_size: sequences per batch over all devices. Metrics under levanter's names depend on it slightly (its bits
            per byte are averages over batches), the exact ones do not.
        mesh: the mesh on which the parameters lie.
        vocab_size: rows of the embedding.
        tokenizer: for bits per byte; None leaves them out.
        max_batches: batches per set at most.
        compute_dtype: of the forward pass.

    Raises:
        ValueError: if there are no sets, the batch size does not divide over the mesh, or the bytes of the tokenizer's
            tokens cannot be told.
    """
    if not sets:
        raise ValueError("there is nothing to evaluate on: no component of the data config has a validation split")
    shards = batch_shards(mesh)
    if batch_size % shards != 0:
        raise ValueError(
            f"eval.eval_batch_size={batch_size} does not divide over {shards} data-parallel devices: "
            f"use {-(-batch_size // shards) * shards}"
        )
    if max_batches is not None:
        _say_what_is_left_out(sets, max_batches * batch_size)
    table = None if tokenizer is None else token_bytes(tokenizer, vocab_size)
    # Every process has the whole table, so one global array can be made of it.
    on_mesh = None if table is None else jax.device_put(table, NamedSharding(mesh, PartitionSpec()))

    compiled: list[Callable[..., tuple[PositionLosses, Float[Array, "B sums"]]]] = []

    def build(names: MarinTokenizer | None, max_examples: int | None) -> TaggedEvaluator[EvalExample, _Pass]:
        evaluator = TaggedEvaluator(
            EvalBatch=Axis("batch", batch_size),
            tagged_eval_sets=sets,
            loss_fn=lambda _, losses: losses,
            tokenizer=names,
            device_mesh=mesh,
            axis_mapping=_AXIS_MAPPING,
            max_examples_per_dataset=max_examples,
        )
        evaluator.loader.max_buffered_batches = _PREFETCHED_BATCHES
        average = evaluator.accum_for_batch
        spaced = {
            tags[-1] for dataset, tags in sets if isinstance(dataset, VocabCheckedDataset) and dataset.spaces_before_eos
        }
        levanters = jnp.array([name in spaced for name in evaluator.dataset.tag_to_index], jnp.int32)

        # One forward pass serves levanter's averages, which take the losses for their "batch", and the exact sums.
        def accumulate(one_pass: _Pass, state: eqx.Module, batch: EvalExample, tags: Array) -> eqx.Module:
            leave_if_told_to_stop()
            plain = grug_lm_example_from_named(batch) if isinstance(batch, LmExample) else batch
            arguments = one_pass.params, plain, tags, on_mesh, levanters, compute_dtype
            if not compiled:  # Ahead, as a call of a `filter_jit` waits for what it has dispatched.
                compiled.append(cast(Any, _position_losses).lower(*arguments).compile())
            losses, sums = compiled[0](*arguments)
            one_pass.sums.append(sums)
            return average(None, state, losses, tags)

        evaluator.accum_for_batch = accumulate
        return evaluator

    return TaggedEval(
        evaluator=build(tokenizer, None if max_batches is None else max_batches * batch_size),
        first_sequences=build(None, 1),
        mesh=mesh,
        exact=table is not None,
    )


def _say_what_is_left_out(sets: TaggedSets, most: int) -> None:
    sizes = [blocking_wait(dataset.async_len()) for dataset, _ in sets]
    taken = sum(min(size, most) for size in sizes)
    if taken < sum(sizes):
        everything = offer("eval.max_eval_batches", "null")
        logger.info(
            "evaluations take %s of the %s held-out sequences, %s of a set at most; all of them with %s",
            f"{taken:,}",
            f"{sum(sizes):,}",
            f"{most:,}",
            everything,
        )


def build_tagged_eval_callback(
    evaluation: TaggedEval, config: GrugEvalConfig
) -> Callable[[GrugTrainState], dict[str, float]]:
    """Makes the function that evaluates a state as the config says: its parameters, their moving average, or both.

    The moving average's metrics stand under `eval/ema/`. A state without one, where only it is to be evaluated, is a
    `ValueError`.
    """

    def evaluate(state: GrugTrainState) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if config.eval_current:
            metrics |= evaluation.evaluate(state.params)
        if config.eval_ema and state.ema_params is not None:
            metrics |= evaluation.evaluate(state.ema_params, prefix="eval/ema")
        if not metrics:
            raise ValueError(
                "eval.eval_current=false leaves the moving average to evaluate, and the run keeps none: "
                f"set trainer.ema_beta, or give {offer('eval.eval_current', 'true')}"
            )
        return metrics

    return evaluate


@eqx.filter_jit
def _position_losses(
    params: LanguageModel,
    batch: LmBatch,
    tags: Int[Array, "B K"],
    table: TokenBytes | None,
    levanters: Int[Array, " K"],
    compute_dtype: ComputeDtype,
) -> tuple[PositionLosses, Float[Array, "B sums"]]:
    """Returns what `TaggedEvaluator` wants, and of each sequence the weighted nats and bytes of its text and its tags.

    `levanters` marks the tags of what levanter tokenized: documents that end in a space of its own.
    """
    losses, weights = per_token_loss(params, batch, compute_dtype=compute_dtype), batch.loss_weight
    if table is None:
        nats, counts = losses, jnp.zeros_like(weights)
    else:
        text = table.of_predicted(batch.tokens, jnp.any((tags * levanters) > 0, axis=1))
        nats, counts = jnp.where(text.is_text, losses, 0.0), text.counts * weights
    sums = jnp.stack([jnp.sum(nats * weights, axis=1), jnp.sum(counts, axis=1)], axis=1)
    # Replicated, so that every process can read all of it.
    rows = reshard(jnp.concatenate([sums, tags.astype(sums.dtype)], axis=1), None, None)
    return (losses, weights, next_tokens(batch.tokens)), rows
