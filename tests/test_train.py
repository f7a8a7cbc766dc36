from dataclasses import replace
from typing import Any, override

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float, Int, PyTree
from levanter.data.text.examples import GrugLmExample

from grug_native import train as train_module
from grug_native.language_model import Aux, FlopsPerToken, LanguageModel
from grug_native.loss import next_token_loss
from grug_native.model import GrugModelConfig, Transformer
from grug_native.optimizer import AdamWConfig, GrugOptimizer
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import MeshAxes, batch_sharding, create_mesh
from grug_native.state import GrugTrainState, init_train_state
from grug_native.train import CompiledStep, GrugStepConfig, PlainBatch, StepMetrics, train_step
from grug_native.types import AttentionMask, LmBatch, Scalar
from tests.fixtures_run import SMALL_MODEL, llama, make_batch
from tests.tolerance import assert_close, gradient_terms, loss_terms

LOSS_TERMS, GRADIENT_TERMS = loss_terms(SMALL_MODEL, 128, 32), gradient_terms(SMALL_MODEL, 128, 32)
CONFIG = AdamWConfig(learning_rate=0.01, epsilon=1e-3, schedule=ScheduleConfig(warmup=0))
OPTIMIZER = GrugOptimizer(CONFIG, 10)


def init(*, ema: bool = False) -> GrugTrainState:
    return init_train_state(SMALL_MODEL, OPTIMIZER, key=jax.random.key(0), ema=ema)


def run(steps: int, config: GrugStepConfig = GrugStepConfig()) -> tuple[GrugTrainState, list[StepMetrics]]:
    state, metrics = init(ema=config.ema_beta is not None), []
    for step in range(steps):
        state, reported = train_step(OPTIMIZER, state, make_batch(step), config=config)
        metrics.append(reported)
    return state, metrics


def test_golden_numbers() -> None:
    """If these move, the mathematics of a step has changed: say so in the change that updates them."""
    state, metrics = run(3, GrugStepConfig(ema_beta=0.9, z_loss_weight=1e-4))
    golden = [5.70993, 5.71922, 5.72773]
    assert_close([float(m.loss) for m in metrics], golden, terms=LOSS_TERMS)
    assert [int(m.batch_digest) for m in metrics] == [200358857, 1733147536, 3715804951]
    assert int(state.step) == 3


def test_a_step_is_gradient_update_and_norms() -> None:
    start, batch = init(), make_batch()
    loss, grads = jax.jit(jax.value_and_grad(lambda p: next_token_loss(p, batch)[0]))(start.params)
    updates, _ = jax.jit(OPTIMIZER.update)(grads, start.opt_state, start.params)
    params = optax.apply_updates(start.params, updates)
    state, metrics = train_step(OPTIMIZER, start, batch)
    # A small gradient is divided by AdamW's epsilon, and so is its rounding.
    amplified = 0.01 / 1e-3 * jnp.abs(grads.head).max()
    assert_close(llama(state.params).head, llama(params).head, terms=GRADIENT_TERMS, magnitude=amplified)
    expected = (loss, optax.global_norm(grads), optax.global_norm(updates), optax.global_norm(params), 0.01, 128)
    got = (
        metrics.loss,
        metrics.grad_norm,
        metrics.update_norm,
        metrics.param_norm,
        metrics.learning_rate,
        metrics.tokens,
    )
    squares = sum(leaf.size for leaf in jax.tree.leaves(params))
    for number, wanted in zip(got, expected, strict=True):
        assert_close(number, wanted, terms=GRADIENT_TERMS + squares)
    assert int(state.step) == 1 and not metrics.nonfinite


def test_the_average_follows_the_parameters() -> None:
    first, _ = run(1, GrugStepConfig(ema_beta=0.75))
    assert first.ema_params is not None
    expected = 0.75 * llama(init().params).embed + 0.25 * llama(first.params).embed
    assert_close(llama(first.ema_params).embed, expected, terms=3)


@pytest.mark.parametrize("ema", [False, True])
def test_an_average_needs_its_place_in_the_state(ema: bool) -> None:
    with pytest.raises(ValueError, match="ema_beta"):
        train_step(OPTIMIZER, init(ema=ema), make_batch(), config=GrugStepConfig(ema_beta=None if ema else 0.9))


def test_the_state_is_donated_and_the_batch_is_not() -> None:
    state, batch = init(), make_batch()
    train_step(OPTIMIZER, state, batch)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(llama(state.params).embed)
    np.asarray(batch.tokens)


@pytest.mark.parametrize("axes", [MeshAxes(data=4), MeshAxes(replica_dcn=2, data=1, model=2)])
def test_a_mesh_changes_nothing_but_rounding(axes: MeshAxes) -> None:
    _, alone = run(2)
    with jax.set_mesh(create_mesh(4, axes)):
        _, metrics = run(2)
    assert_close([float(m.loss) for m in metrics], [float(m.loss) for m in alone], terms=LOSS_TERMS)
    assert [int(m.batch_digest) for m in metrics] == [int(m.batch_digest) for m in alone]


def poisoned() -> GrugLmExample:
    batch = make_batch()
    return replace(batch, loss_weight=batch.loss_weight * jnp.nan)


def test_what_is_not_finite_is_told() -> None:
    state, metrics = train_step(OPTIMIZER, init(), poisoned())
    assert bool(metrics.nonfinite)
    assert not jnp.isfinite(llama(state.params).embed).all()


def test_skipping_leaves_the_state_but_for_its_step() -> None:
    config = GrugStepConfig(skip_nonfinite=True, ema_beta=0.5)
    before, _ = run(1, config)
    kept = jax.tree.map(np.asarray, (before.params, before.opt_state, before.ema_params))
    state, metrics = train_step(OPTIMIZER, before, poisoned(), config=config)
    assert bool(metrics.nonfinite) and int(state.step) == 2
    after = jax.tree.map(np.asarray, (state.params, state.opt_state))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(kept[:2]), strict=True):
        # Counters go on with the step, and the schedule with them.
        np.testing.assert_array_equal(a, b if np.issubdtype(b.dtype, np.floating) else b + 1)
    assert state.ema_params is not None and bool(jnp.isfinite(llama(state.ema_params).embed).all())


def test_one_executable_serves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[int] = []

    def counted(params: LanguageModel, batch: LmBatch, **options: Any) -> tuple[Scalar, Aux]:
        traces.append(batch.tokens.shape[1])
        return next_token_loss(params, batch, **options)

    monkeypatch.setattr(train_module, "next_token_loss", counted)
    state = init()
    for step in range(4):
        # A new, equal optimizer and config are no new static arguments; only a new batch shape is.
        again = GrugOptimizer(replace(CONFIG), 10)
        batch = make_batch(step, seq_len=16 if step < 3 else 24)
        state, _ = train_step(again, state, batch, config=GrugStepConfig())
    assert traces == [16, 24]


class Chatty(LanguageModel):
    """A model with a loss and numbers of its own."""

    inner: Transformer
    config: GrugModelConfig = eqx.field(static=True)

    @override
    def hidden(
        self, tokens: Int[Array, "B S"], mask: AttentionMask, *, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B S D"], Aux, PyTree | None]:
        states, _, cache = self.inner.hidden(tokens, mask, cache=cache)
        norm = jnp.sum(jnp.square(self.inner.final_norm.weight))
        return states, Aux({"toy/gains": 0.5 * norm}, {"toy/vector": jnp.arange(2.0), "toy/norm": norm}), cache

    @override
    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return self.inner.unembed(hidden)

    @override
    def init_cache(self, batch: int, length: int, dtype: str) -> PyTree:
        return self.inner.init_cache(batch, length, dtype)

    @override
    def flops_per_token(self, seq_len: int) -> FlopsPerToken:
        return self.inner.flops_per_token(seq_len)


def test_a_models_own_losses_are_added_and_its_numbers_reported() -> None:
    plain, batch = init(), make_batch()
    talking = Chatty(inner=llama(plain.params), config=SMALL_MODEL)
    chatty = eqx.tree_at(
        lambda state: (state.params, state.opt_state),
        plain,
        (talking, OPTIMIZER.init(talking)),
    )
    chatty = jax.tree.map(jnp.copy, chatty)  # A step takes the memory of what it is given.
    _, quiet = train_step(OPTIMIZER, plain, batch)
    state, metrics = train_step(OPTIMIZER, chatty, batch)
    assert_close(metrics.loss, quiet.loss + 0.5 * 32, terms=LOSS_TERMS)
    assert {name: np.asarray(value).tolist() for name, value in metrics.extra.items()} == {
        "toy/gains": 16.0,
        "toy/norm": 32.0,
        "toy/vector": [0.0, 1.0],
    }
    assert isinstance(state.params, Chatty)
    assert float(state.params.inner.final_norm.weight.max()) < 1  # The loss of its own has a gradient.


def test_norms_are_measured_every_so_many_steps_under_levanters_names() -> None:
    _, metrics = run(3, GrugStepConfig(watch_every=2))
    first, second, third = (m.extra for m in metrics)
    assert first.keys() == second.keys() == third.keys()
    kinds = {name.split("/", 2)[0] for name in first}
    assert kinds == {"grad", "params", "updates"}
    assert {"grad/norm/blocks.1.attn.wq", "params/norm/embed", "updates/norm/final_norm.weight"} <= first.keys()
    assert all(np.isnan(value) for value in second.values())
    of_gradients = [float(value) for name, value in third.items() if name.startswith("grad/")]
    assert_close(np.linalg.norm(of_gradients), metrics[2].grad_norm, terms=len(of_gradients) * 9600)


@pytest.mark.parametrize("axes", [MeshAxes(data=4), MeshAxes(data=2, model=2)])
def test_a_step_that_was_compiled_ahead_does_the_same(axes: MeshAxes) -> None:
    mesh = create_mesh(4, axes)
    with jax.set_mesh(mesh):
        shape = eqx.filter_eval_shape(init_train_state, SMALL_MODEL, OPTIMIZER, key=jax.random.key(0))

        def on_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = leaf.sharding.spec if isinstance(leaf.sharding, jax.NamedSharding) else jax.P()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

        packed = PlainBatch.abstract(4, 32, packed=True, sharding=batch_sharding(mesh))
        step = CompiledStep(OPTIMIZER, jax.tree.map(on_mesh, shape), packed, GrugStepConfig())
        batch = jax.device_put(make_batch(packed=True), batch_sharding(mesh))
        state, metrics = step(init(), batch)
        expected, of_expected = train_step(OPTIMIZER, init(), batch)
    assert metrics.loss == of_expected.loss
    assert eqx.tree_equal(state.params, expected.params)
