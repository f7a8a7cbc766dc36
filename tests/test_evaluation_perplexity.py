import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis
from haliax.partitioning import axis_mapping
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jaxtyping import Array
from levanter.callbacks import StepInfo
from levanter.data.dataset import ListAsyncDataset
from levanter.data.text.datasets import LmDataConfig
from levanter.data.text.examples import GrugLmExample
from levanter.eval import cb_tagged_lm_evaluate
from levanter.grug.attention import AttentionMask
from levanter.models.llama import LlamaLMHeadModel
from levanter.tracker import NoopTracker, current_tracker

from experiments.benchmarks.peers.levanter_llama import to_llama
from grug_native.data.text_tokens import text_only
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.evaluation.perplexity import (
    EvalExample,
    TaggedEval,
    build_eval_sets,
    build_tagged_eval_callback,
    build_tagged_evaluator,
)
from grug_native.language_model import logits
from grug_native.loss import per_token_loss
from grug_native.model import Transformer
from grug_native.optimizer import AdamWConfig, GrugOptimizer
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import BATCH_AXES, MeshAxes, create_mesh
from grug_native.state import GrugTrainState, init_train_state
from grug_native.train import train_step
from tests.fixtures_run import SMALL_MODEL, make_batch
from tests.tolerance import loss_terms, tolerance

SEQ_LEN = SMALL_MODEL.max_seq_len
VOCAB = SMALL_MODEL.vocab_size
TERMS = loss_terms(SMALL_MODEL, 8 * SEQ_LEN, SEQ_LEN)


def _params(mesh: Mesh, seed: int = 0) -> Transformer:
    # Weights far from zero, so that tokens and contexts differ in their losses.
    with jax.set_mesh(mesh):
        return jax.tree.map(lambda w: 5 * w, Transformer.init(SMALL_MODEL, key=jax.random.key(seed)))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return create_mesh(4)


@pytest.fixture(scope="module")
def params(mesh: Mesh) -> Transformer:
    return _params(mesh)


@pytest.fixture(scope="module")
def nested(small_corpus: LmDataConfig) -> LmDataConfig:
    """The two domains under one parent, one of them with a further tag."""
    caves, clubs = small_corpus.components["caves"], small_corpus.components["clubs"]
    root = f"{small_corpus.cache_dir}/"
    return replace(
        small_corpus,
        train_weights=None,
        components={
            "grug/caves": replace(caves, cache_dir=root + "caves"),
            "grug/clubs": replace(clubs, cache_dir=root + "clubs", tags=["weapons"]),
        },
    )


@pytest.fixture(scope="module")
def evaluation(nested: LmDataConfig, mesh: Mesh) -> TaggedEval:
    sets = build_eval_sets(nested, SEQ_LEN, VOCAB)
    return build_tagged_evaluator(sets, batch_size=8, mesh=mesh, vocab_size=VOCAB, tokenizer=nested.the_tokenizer)


class _Recorder(NoopTracker):
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    @override
    def log(self, metrics: Any, *, step: int | None, commit: bool | None = None) -> None:
        self.logged |= metrics


@dataclass(frozen=True)
class _LevanterState:
    step: Array
    model: LlamaLMHeadModel


def test_metrics_equal_levanters_own_of_its_own_model(
    nested: LmDataConfig, evaluation: TaggedEval, params: Transformer
) -> None:
    ours = evaluation.evaluate(params)
    llama = to_llama(jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params))
    one_device = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    callback = cb_tagged_lm_evaluate(
        Axis("batch", 8),
        nested.tagged_eval_sets(Axis("position", SEQ_LEN)),
        nested.the_tokenizer,
        one_device,
        {"batch": "data"},
        eval_ema=False,
    )
    recorder = _Recorder()
    with current_tracker(recorder), jax.set_mesh(one_device), axis_mapping({"batch": "data"}):
        callback(StepInfo(_LevanterState(jnp.array(1), llama), 0.0, 0.0))
    theirs = {name: value for name, value in recorder.logged.items() if not name.endswith("_time")}
    assert {"eval/grug/macro_loss", "eval/grug/clubs/loss", "eval/weapons/bpb", "eval/macro_bpb"} <= theirs.keys()
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=tolerance(TERMS, max(theirs.values())))
    assert {name for name in ours if "exact" not in name and not name.endswith("_time")} == theirs.keys()


def _one_document_examples(texts: Sequence[str], encode: Callable[[str], list[int]], eos: int) -> list[GrugLmExample]:
    """One text a sequence, after EOS; what follows it has no weight."""
    examples: list[GrugLmExample] = []
    for text in texts:
        ids = encode(text)
        tokens = np.full(SEQ_LEN, eos, np.int32)
        tokens[1 : len(ids) + 1] = ids
        weight = (np.arange(SEQ_LEN) < len(ids)).astype(np.float32)
        examples.append(GrugLmExample(jnp.asarray(tokens), jnp.asarray(weight), AttentionMask.causal()))
    return examples


def _nats(params: Transformer, ids: Sequence[int], eos: int) -> float:
    """Negative log-likelihood of a text after EOS, by the definition."""
    tokens = np.zeros((4, SEQ_LEN), np.int32)
    tokens[:, : len(ids) + 1] = [eos, *ids]
    found = np.asarray(_logits(params, jnp.asarray(tokens)), np.float64)[0, : len(ids)]
    shifted = found - found.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -float(log_probability[np.arange(len(ids)), list(ids)].sum())


@jax.jit
def _logits(params: Transformer, tokens: Array) -> Array:
    return logits(params, tokens, AttentionMask.causal())


@settings(max_examples=12, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=7), min_size=1, max_size=9), batch_size=st.sampled_from([4, 8]))
def test_exact_bits_times_bytes_is_the_likelihood_of_the_text(
    small_corpus: LmDataConfig, mesh: Mesh, params: Transformer, texts: list[str], batch_size: int
) -> None:
    tokenizer = text_only(small_corpus.the_tokenizer)
    eos = tokenizer.eos_token_id
    assert eos is not None
    examples = _one_document_examples(texts, tokenizer.encode, eos)
    evaluation = build_tagged_evaluator(
        [(ListAsyncDataset(examples), ["texts"])],
        batch_size=batch_size,
        mesh=mesh,
        vocab_size=VOCAB,
        tokenizer=tokenizer,
    )
    exact = evaluation.evaluate(params)["eval/bpb_exact"]
    with jax.set_mesh(mesh):
        nats = sum(_nats(params, tokenizer.encode(text), eos) for text in texts)
    assert exact * len("".join(texts).encode()) * math.log(2) == pytest.approx(nats, abs=tolerance(TERMS, nats))


_losses = jax.jit(per_token_loss)


def _bits_by_hand(data: LmDataConfig, mesh: Mesh, params: Transformer, *, space: bool) -> float:
    """Of the held-out texts, laid end to end: nats of their tokens over their bytes, token by token."""
    tokenizer, vocabulary = data.the_tokenizer, {i: text for text, i in data.the_tokenizer.get_vocab().items()}
    nats = count = 0.0
    for dataset, [*_, name] in build_eval_sets(data, SEQ_LEN, VOCAB):
        ids: list[int] = []
        sizes: list[int] = []  # of each token; 0 for what is around a text
        file = Path(str(data.cache_dir)).parent / "text" / f"{name}.validation.jsonl"
        for line in file.read_text().splitlines():
            own = tokenizer.encode(json.loads(line)["text"] + " " * space)
            ids += [*own, 0]
            sizes += [len(vocabulary[token]) for token in own[:-1]] + [len(vocabulary[own[-1]]) - space, 0]
        examples = [dataset.as_sync_dataset()[row] for row in range(len(ids) // SEQ_LEN)]
        assert [int(token) for example in examples for token in example.tokens] == ids[: len(examples) * SEQ_LEN]
        padded = examples + examples[:1] * (-len(examples) % 4)
        batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
        with jax.set_mesh(mesh):
            batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P(BATCH_AXES)))
            losses = np.asarray(_losses(params, batch), np.float64)
        for row in range(len(examples)):
            for position in range(1, SEQ_LEN):
                at = row * SEQ_LEN + position
                # Of levanter's, a last token that ends in a space may be the one before an end.
                left_out = space and position == SEQ_LEN - 1 and vocabulary[ids[at]].endswith("Ġ")
                if sizes[at] and not left_out:
                    nats, count = nats + losses[row, position - 1], count + sizes[at]
    return nats / count / math.log(2)


@pytest.mark.parametrize("space", [False, True])
def test_exact_bits_of_held_out_texts_are_those_of_the_texts_alone(
    small_corpus: LmDataConfig, older_corpus: LmDataConfig, mesh: Mesh, params: Transformer, space: bool
) -> None:
    data = older_corpus if space else small_corpus
    evaluation = build_tagged_evaluator(
        build_eval_sets(data, SEQ_LEN, VOCAB), batch_size=8, mesh=mesh, vocab_size=VOCAB, tokenizer=data.the_tokenizer
    )
    expected = _bits_by_hand(data, mesh, params, space=space)
    assert evaluation.evaluate(params)["eval/bpb_exact"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "axes", "devices"), [(12, MeshAxes(data=2, model=2), 4), (1, MeshAxes(), 1)])
def test_exact_bits_depend_neither_on_batches_nor_on_the_mesh(
    nested: LmDataConfig, evaluation: TaggedEval, params: Transformer, batch_size: int, axes: MeshAxes, devices: int
) -> None:
    reference = {name: value for name, value in evaluation.evaluate(params).items() if "exact" in name}
    assert len(reference) == 7
    other_mesh = create_mesh(batch_size, axes, devices=jax.devices()[:devices])
    sets = build_eval_sets(nested, SEQ_LEN, VOCAB)
    other = build_tagged_evaluator(
        sets, batch_size=batch_size, mesh=other_mesh, vocab_size=VOCAB, tokenizer=nested.the_tokenizer
    )
    metrics = other.evaluate(_params(other_mesh))
    bound = tolerance(TERMS, max(reference.values()))
    assert {name: metrics[name] for name in reference} == pytest.approx(reference, abs=bound)


def test_named_examples_are_taken_as_they_are(
    nested: LmDataConfig,
    evaluation: TaggedEval,
    mesh: Mesh,
    params: Transformer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    named: list[tuple[Any, list[str]]] = list(nested.tagged_eval_sets(Axis("position", SEQ_LEN)))
    other = build_tagged_evaluator(named, batch_size=8, mesh=mesh, vocab_size=VOCAB, max_batches=1)
    metrics = other.evaluate(params)
    assert not any("bpb" in name for name in metrics)
    plain = build_tagged_evaluator(
        build_eval_sets(nested, SEQ_LEN, VOCAB), batch_size=8, mesh=mesh, vocab_size=VOCAB, max_batches=1
    )
    own, whole = (each.evaluate(params)["eval/macro_loss"] for each in (plain, evaluation))
    assert metrics["eval/macro_loss"] == pytest.approx(own, abs=tolerance(TERMS, own))
    # One batch of each set only, which is said.
    assert "evaluations take 16 of the " in caplog.text
    assert "all of them with --eval.max_eval_batches=null" in caplog.text
    assert metrics["eval/macro_loss"] != pytest.approx(whole, abs=tolerance(TERMS, whole))


@contextmanager
def _no_compilation() -> Any:
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def _state(mesh: Mesh, *, ema: bool) -> GrugTrainState:
    optimizer = GrugOptimizer(AdamWConfig(schedule=ScheduleConfig(warmup=0)), 10)
    with jax.set_mesh(mesh):
        return init_train_state(SMALL_MODEL, optimizer, key=jax.random.key(3), ema=ema)


def test_nothing_is_compiled_twice(evaluation: TaggedEval, mesh: Mesh) -> None:
    optimizer, batch = GrugOptimizer(AdamWConfig(schedule=ScheduleConfig(warmup=0)), 10), make_batch(batch=4)
    state = _state(mesh, ema=False)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P(BATCH_AXES)))
        state, _ = train_step(optimizer, state, batch)
        first = evaluation.evaluate(state.params)
        state, _ = train_step(optimizer, state, batch)
        with _no_compilation():
            second = evaluation.evaluate(state.params, prefix="again")
            state, _ = train_step(optimizer, state, batch)
    assert second["again/loss"] != first["eval/loss"]


def test_a_state_is_evaluated_as_the_config_says(evaluation: TaggedEval, mesh: Mesh, params: Transformer) -> None:
    state = _state(mesh, ema=True)
    averaged = GrugTrainState(state.step, state.params, state.opt_state, state.training_key, params)
    both = build_tagged_eval_callback(evaluation, GrugEvalConfig())(averaged)
    own = {name.removeprefix("eval/ema/"): value for name, value in both.items() if name.startswith("eval/ema/")}
    direct = {name.removeprefix("eval/"): value for name, value in evaluation.evaluate(params).items()}
    times = {"loading_time", "total_time"}
    assert own.keys() == direct.keys()
    assert {name: own[name] for name in own.keys() - times} == {name: direct[name] for name in own.keys() - times}
    assert both["eval/loss"] == evaluation.evaluate(state.params)["eval/loss"] != both["eval/ema/loss"]

    only_ema = build_tagged_eval_callback(evaluation, GrugEvalConfig(eval_current=False))
    assert all(name.startswith("eval/ema/") for name in only_ema(averaged))
    with pytest.raises(ValueError, match=r"trainer\.ema_beta"):
        only_ema(_state(mesh, ema=False))
    without = build_tagged_eval_callback(evaluation, GrugEvalConfig(eval_ema=False))(averaged)
    assert "eval/loss" in without
    assert "eval/ema/loss" not in without


def test_the_check_looks_at_each_set(
    nested: LmDataConfig, evaluation: TaggedEval, mesh: Mesh, params: Transformer
) -> None:
    sets = build_eval_sets(nested, SEQ_LEN, VOCAB)
    firsts = [dataset.as_sync_dataset()[0] for dataset, _ in sets]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *firsts, *firsts)
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P(BATCH_AXES)))
        losses = per_token_loss(params, batch)
        mean = float(jnp.sum(losses * batch.loss_weight) / jnp.sum(batch.loss_weight))
    assert evaluation.check_one_batch(params) == pytest.approx(mean, abs=tolerance(TERMS, mean))

    outside = build_eval_sets(nested, SEQ_LEN, 100)
    with pytest.raises(ValueError, match=r"grug/caves \(validation\).*outside the vocabulary"):
        build_tagged_evaluator(outside, batch_size=4, mesh=mesh, vocab_size=VOCAB).check_one_batch(params)


def test_what_cannot_be_evaluated_on_is_named(
    nested: LmDataConfig, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert build_eval_sets(nested, 10_000_000, VOCAB) == []
    assert "weapons" in caplog.text
    with pytest.raises(ValueError, match="validation split"):
        build_tagged_evaluator([], batch_size=4, mesh=mesh, vocab_size=VOCAB)
    sets: list[tuple[ListAsyncDataset[EvalExample], list[str]]] = [(ListAsyncDataset([]), ["x"])]
    with pytest.raises(ValueError, match=r"eval\.eval_batch_size=6 does not divide over 4 .*use 8"):
        build_tagged_evaluator(sets, batch_size=6, mesh=mesh, vocab_size=VOCAB)


def test_when_to_evaluate() -> None:
    every = GrugEvalConfig(steps_per_eval=3)
    assert [step for step in range(8) if every.is_due(step, 7)] == [0, 3, 6, 7]
    assert [step for step in range(8) if GrugEvalConfig().is_due(step, 7)] == [0, 7]
    mistakes: list[dict[str, Any]] = [
        {"steps_per_eval": 0},
        {"eval_batch_size": -1},
        {"max_eval_batches": 0},
        {"eval_current": False, "eval_ema": False},
    ]
    for wrong in mistakes:
        with pytest.raises(ValueError, match=rf"eval\.{next(iter(wrong))}"):
            GrugEvalConfig(**wrong)
