"""What every variant has to do, a kill and an accelerator among it; another one joins by a line of `VARIANTS`."""

import json
import signal
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from experiments.variants.modded import ModdedConfig
from experiments.variants.own_optimizer import NorMuonConfig
from grug_native.attention import Mask, with_window
from grug_native.config import load_config
from grug_native.evaluation.drawing import Sampling
from grug_native.evaluation.generate import Prompt, Sampler, generate, sampler_of
from grug_native.evaluation.scoring import Request, Scorer
from grug_native.kernels.backend import Backend
from grug_native.language_model import (
    LanguageModel,
    ModelConfig,
    abstract_parameters,
    logits,
    parameter_kinds,
    shard_parameters,
)
from grug_native.loss import next_token_loss
from grug_native.optimizer import AdamWConfig, GrugOptimizer, OptimizerConfig
from grug_native.parsing.named_types import encode_named
from grug_native.rotary import GrugRopeConfig
from grug_native.runner import GrugRunner
from grug_native.sharding import MeshAxes, batch_sharding, create_mesh
from grug_native.state import GrugTrainState, init_train_state
from grug_native.train import GrugStepConfig, PlainBatch, lower_train_step
from tests.accelerators import HOPPER, PLATFORM, TPU, pretend
from tests.faults.runs import NUM_STEPS, ForkServer, Run
from tests.fixtures_run import SMALL_MIXTURE, SMALL_MODEL

MODDED = ModdedConfig(vocab_size=300, hidden_dim=32, num_layers=2, num_heads=2, max_seq_len=32, window=8)
ADAMW = AdamWConfig(learning_rate=1e-2)


@dataclass(frozen=True)
class Variant:
    model: ModelConfig = SMALL_MODEL
    optimizer: OptimizerConfig = ADAMW
    axes: MeshAxes = MeshAxes(data=2, model=2)


VARIANTS = {
    "transformer": Variant(),
    "modded": Variant(MODDED),
    "moe": Variant(SMALL_MIXTURE, axes=MeshAxes(data=2, expert=2)),
    "own_optimizer": Variant(optimizer=NorMuonConfig(learning_rate=1e-2)),
}

SWITCHES: dict[str, ModelConfig] = {
    "transformer": SMALL_MODEL,
    "llama3 rope": replace(SMALL_MODEL, rope=GrugRopeConfig(llama3_factor=8.0, original_max_seq_len=16)),
    "one kv head": replace(SMALL_MODEL, num_kv_heads=1),
    "all kv heads": replace(SMALL_MODEL, num_kv_heads=4),
    **{
        f"modded qk_norm={qk} soft_cap={cap} tied={tied}": replace(MODDED, qk_norm=qk, soft_cap=cap, tied=tied)
        for qk, cap, tied in ((True, 15.0, False), (False, None, True), (True, None, True), (False, 15.0, False))
    },
    "modded wide window": replace(MODDED, window=20),
    **{
        f"moe {k} of {e}": replace(SMALL_MIXTURE, num_experts=e, experts_per_token=k)
        for k, e in ((1, 4), (2, 4), (3, 3))
    },
}


@dataclass(frozen=True)
class Finished:
    """A run of a variant that nobody disturbed."""

    variant: Variant
    run: Run

    @cached_property
    def runner(self) -> GrugRunner:
        return GrugRunner(load_config(self.run.folder))

    @cached_property
    def state(self) -> GrugTrainState:
        return self.runner.restore()


@pytest.fixture(scope="module", params=VARIANTS)
def finished(request: pytest.FixtureRequest, server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    variant = VARIANTS[request.param]
    run = _run(server, tmp_path_factory.mktemp("variant") / "run", variant)
    run.fit(command=("train", "--config_path", str(run.config))).expect(0)
    return Finished(variant, run)


def _run(server: ForkServer, folder: Path, variant: Variant) -> Run:
    run = server.run(folder, base="eval")
    sections = {
        "model": encode_named("model", variant.model),
        "optimizer": json.loads(json.dumps(encode_named("optimizer", variant.optimizer))),
        "eval.steps_per_eval": None,
        "trainer.ema_beta": None,
    }
    return run.edit(sections)


def test_a_killed_run_ends_as_an_undisturbed_one(finished: Finished, server: ForkServer, tmp_path: Path) -> None:
    run = _run(server, tmp_path / "run", finished.variant)
    command = ("train", "--config_path", str(run.config))
    run.fit("kill@step:5", command=command).expect(-signal.SIGKILL)
    assert 0 < run.steps[0] < NUM_STEPS
    run.fit(command=command).expect(0)
    run.expect_equal(finished.run)


@eqx.filter_jit
def _logits(params: LanguageModel, tokens: Array) -> Array:
    return logits(params, tokens, Mask())


def test_greedy_text_is_that_of_the_full_forward_pass(finished: Finished) -> None:
    ids = [7, 250, 3]
    new = generate(finished.state.params, ids, max_new_tokens=12, temperature=0.0)
    with jax.set_mesh(finished.runner.mesh):
        full = np.asarray(_logits(finished.state.params, jnp.asarray([[*ids, *new, *(32 - 15) * [0]]] * 4)))[0]
    assert new == full[2:14].argmax(-1).tolist()


def test_it_is_evaluated_and_scored(finished: Finished, tmp_path: Path) -> None:
    metrics = finished.runner.evaluate(finished.state)
    assert 0 < metrics["eval/bpb_exact"] < 20
    documents = [{"good": "grug say", "bad": "say grug"}, {"good": "very bad", "bad": "brain ögg"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pairs.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    results = finished.runner.harness(finished.state, [task], log_samples=True)
    assert 0 <= results["lm_eval/pairs/acc"] <= 1
    (report,) = (finished.run.folder / "harness").glob("*.json")
    samples = json.loads(report.read_text())["samples"]["pairs"]
    tokenizer = finished.runner.config.data.the_tokenizer
    rows = [
        [tokenizer.eos_token_id, *tokenizer.encode(text)]
        for sample in samples
        for text in (sample["doc"]["good"], sample["doc"]["bad"])
    ]
    found = [float(pair[0]) for sample in samples for pair in sample["filtered_resps"]]
    tokens = jnp.asarray([row + [0] * (32 - len(row)) for row in rows])
    with jax.set_mesh(finished.runner.mesh):
        table = np.asarray(jax.nn.log_softmax(_logits(finished.state.params, tokens)))
    wanted = [float(sum(table[n, at, row[at + 1]] for at in range(len(row) - 1))) for n, row in enumerate(rows)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_its_plan_is_its_own(finished: Finished) -> None:
    plan, model = finished.runner.plan(), finished.variant.model
    assert plan.parameters["total"] == sum(leaf.size for leaf in jax.tree.leaves(finished.state.params))
    assert plan.flops_per_token == abstract_parameters(model).flops_per_token(32)
    assert {choice.what for choice in plan.choices} >= {"attention", "layers", "cross-entropy"}
    kinds = jax.tree.leaves(parameter_kinds(finished.state.params))
    of_matrices = {group.group for kind, group in zip(kinds, plan.routing, strict=True) if kind == "matrix"}
    assert len(of_matrices) == 1 and not of_matrices & {
        group.group for kind, group in zip(kinds, plan.routing, strict=True) if kind == "norm"
    }


@pytest.mark.parametrize("device", [HOPPER, TPU], ids=["cuda", "tpu"])
@pytest.mark.parametrize("name", VARIANTS)
def test_its_step_lowers_for_accelerators(name: str, device: Backend) -> None:
    variant = VARIANTS[name]
    assert is_dataclass(variant.model)
    model = replace(variant.model, max_seq_len=128)  # The shortest that the TPU kernel takes.
    optimizer, mesh = GrugOptimizer(variant.optimizer, 10), create_mesh(4, variant.axes)
    step = GrugStepConfig(compute_dtype="bfloat16", cross_entropy="blockwise")
    with pretend(device), jax.set_mesh(mesh):
        state = eqx.filter_eval_shape(lambda: init_train_state(model, optimizer, key=jax.random.key(0)))
        batch = PlainBatch.abstract(4, 128, packed=True, sharding=batch_sharding(mesh))
        lowered = lower_train_step(optimizer, state, batch, config=step, platforms=(PLATFORM[device.name],))
        assert "stablehlo" in lowered.as_text()


@eqx.filter_jit
def _larger(model: ModelConfig) -> LanguageModel:
    """Drawn weights that tell tokens apart by more than rounding; and none of zeros, which hide mistakes."""
    drawn, keys = model.init(key=jax.random.key(0)), iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(
        lambda x, kind: x if kind == "norm" else 0.1 * jax.random.normal(next(keys), x.shape),
        drawn,
        parameter_kinds(drawn),
    )


@eqx.filter_jit
def _numbers(params: LanguageModel, tokens: Array, batch: PlainBatch) -> tuple[list[tuple[Array, Array]], list[Array]]:
    """Logits at once and through a cache in pieces, under two masks; and the loss by both kernels."""

    def in_pieces(mask: Mask) -> Array:
        cache, states = params.init_cache(2, 32, "float32"), list[Array]()
        for start, end in ((0, 5), (5, 6), (6, 32)):
            hidden, _, cache = params.hidden(tokens[:, start:end], mask, cache=cache)
            states.append(hidden)
        return params.unembed(jnp.concatenate(states, axis=1))

    masks = (Mask(), with_window(Mask(), 5))
    losses: list[Array] = []
    for kernel in ("full", "blockwise"):
        loss, aux = next_token_loss(params, batch, cross_entropy=kernel)
        losses.append(loss - sum(aux.losses.values()))
    return [(logits(params, tokens, mask), in_pieces(mask)) for mask in masks], losses


@pytest.mark.parametrize("name", SWITCHES)
def test_all_numbers_come_from_one_function(name: str) -> None:
    params = _larger(SWITCHES[name])
    tokens = jax.random.randint(jax.random.key(2), (2, 32), 0, 300)
    batch = PlainBatch(tokens, jnp.ones(tokens.shape).at[:, -1].set(0.0), Mask())
    pairs, losses = jax.device_get(_numbers(params, tokens, batch))
    for whole, pieces in pairs:
        np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    table = np.asarray(jax.nn.log_softmax(pairs[0][0]))
    own = np.take_along_axis(table[:, :-1], np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, -own.mean(), rtol=0, atol=1e-5)
    mesh = create_mesh(2, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        scorer = Scorer(jax.jit(shard_parameters)(params), mesh, 32, 2)
    scores = scorer.score([Request(row[:1], row[1:]) for row in np.asarray(tokens).tolist()])
    np.testing.assert_allclose([score.log_likelihood for score in scores], own.sum(-1), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.optimizer == ADAMW])
def test_texts_of_a_batch_are_those_of_one_at_a_time(name: str) -> None:
    params, rng = _larger(VARIANTS[name].model), np.random.default_rng(0)
    # Longer than the window, and with padding before all but one.
    ids = [rng.integers(0, 300, length).tolist() for length in (5, 16, 1, 11, 9)]
    prompts = [Prompt(own, 12, Sampling(temperature=0.0)) for own in ids]
    found = sampler_of(params, batch_size=8).draw(prompts)
    assert found == sampler_of(params).draw(prompts)
    rows = [own + new for own, new in zip(ids, found, strict=True)]
    full = np.asarray(_logits(params, jnp.asarray([row + (32 - len(row)) * [0] for row in rows]))).argmax(-1)
    assert found == [table[len(own) - 1 :][:12].tolist() for own, table in zip(ids, full, strict=True)]
    with jax.set_mesh(mesh := create_mesh(4, VARIANTS[name].axes)):
        assert Sampler(jax.jit(shard_parameters)(params), mesh, 8).draw(prompts) == found


def _evaluated(params: LanguageModel, batch: PlainBatch) -> tuple[Array, LanguageModel, Array]:
    (loss, _), grads = jax.value_and_grad(lambda p: next_token_loss(p, batch, cross_entropy="full"), has_aux=True)(
        params
    )
    return loss, grads, logits(params, batch.tokens, batch.attn_mask)


def _updated(optimizer: GrugOptimizer, grads: LanguageModel, params: LanguageModel) -> tuple[object, object]:
    _, state = optimizer.update(grads, optimizer.init(params), params)
    return optimizer.update(jax.tree.map(jnp.sin, grads), state, params)


@pytest.mark.parametrize("axes", [MeshAxes(expert=4), MeshAxes(data=2, expert=2), MeshAxes(data=1, expert=2, model=2)])
def test_a_mesh_changes_neither_experts_nor_normuon(axes: MeshAxes) -> None:
    params = _larger(SMALL_MIXTURE)
    tokens = jax.random.randint(jax.random.key(2), (4, 32), 0, 300)
    batch = PlainBatch(tokens, jnp.ones(tokens.shape).at[:, -1].set(0.0), Mask())
    optimizer = GrugOptimizer(NorMuonConfig(), 10)
    wanted = jax.jit(_evaluated)(params, batch)
    updates = jax.jit(_updated, static_argnums=0)(optimizer, wanted[1], params)
    with jax.set_mesh(mesh := create_mesh(4, axes)):
        spread = jax.jit(shard_parameters)(params)
        found = jax.jit(_evaluated)(spread, jax.device_put(batch, batch_sharding(mesh)))
        grads = jax.tree.map(lambda leaf, like: jax.device_put(np.asarray(leaf), like.sharding), wanted[1], spread)
        again = jax.jit(_updated, static_argnums=0)(optimizer, grads, spread)
    for ours, theirs in zip(jax.tree.leaves((found, again)), jax.tree.leaves((wanted, updates)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1e-3, float(np.abs(theirs).max())))
