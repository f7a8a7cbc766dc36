from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_native.mesh import MeshAxes, create_mesh
from grug_native.metrics import abstract_parameters
from grug_native.model import Transformer
from grug_native.optimizer import (
    GrugOptimizer,
    GrugOptimizerConfig,
    OptimizerName,
    decay_mask,
    orthogonalize,
    scale_by_muon,
)
from tests.fixtures_run import SMALL_MODEL, without_runtime_types
from tests.tolerance import assert_close, assert_trees_close, tolerance

PARAMS = abstract_parameters(SMALL_MODEL)
SLOPE = 3.4445
"""By how much a step of Muon's iteration enlarges a singular value near 0."""
NORMS = {".blocks.attn_norm.weight", ".blocks.mlp_norm.weight", ".final_norm.weight"}


def drawn() -> Transformer:
    return Transformer.init(SMALL_MODEL, key=jax.random.key(0))


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_routing_decays_matrices_and_the_head_only(kind: OptimizerName) -> None:
    routes = {route.path: route for route in GrugOptimizer(GrugOptimizerConfig(kind=kind), 10).routing(PARAMS)}
    assert {path for path, route in routes.items() if not route.decayed} == NORMS | {".embed"}
    rest = NORMS | {".embed", ".lm_head"}
    assert {route.group for path, route in routes.items() if path in rest} == {"adamw" if kind == "muon" else kind}
    assert {route.group for path, route in routes.items() if path not in rest} == {kind}
    assert routes[".blocks.attn.wq"].shape == (2, 32, 32)


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon"])
def test_routing_is_what_happens(kind: OptimizerName) -> None:
    # With zero gradients, decay is all that moves a parameter.
    optimizer = GrugOptimizer(GrugOptimizerConfig(kind=kind, warmup=0, learning_rate=0.1, weight_decay=0.5), 10)
    params = jax.tree.map(lambda w: w + 1, drawn())
    updates, _ = eqx.filter_jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for route, update, param in zip(
        optimizer.routing(params), jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
    ):
        assert_close(update, -0.05 * param if route.decayed else jnp.zeros_like(param), terms=4)


def test_adamw_equals_optax() -> None:
    config = GrugOptimizerConfig(learning_rate=0.01, warmup=0, schedule="constant", max_grad_norm=None)
    params = drawn()
    grads = jax.tree.map(jnp.cos, params)
    ours, theirs = GrugOptimizer(config, 10), optax.adamw(0.01, b2=0.95, weight_decay=0.1, mask=decay_mask)
    state, their_state = ours.init(params), theirs.init(params)
    for _ in range(3):
        updates, state = ours.update(grads, state, params)
        expected, their_state = theirs.update(grads, their_state, params)
        # 1 - beta2 of the bias correction is rounded as the 1 is.
        assert_trees_close(updates, expected, terms=10)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    params = drawn()
    big = jax.tree.map(lambda w: 1024 * jnp.ones_like(w), params)  # its squares add up without rounding
    config = GrugOptimizerConfig(learning_rate=0.01, warmup=0, epsilon=1.0, weight_decay=0.0)
    clipped, free = GrugOptimizer(config, 10), GrugOptimizer(replace(config, max_grad_norm=None), 10)
    size = sum(w.size for w in jax.tree.leaves(params))
    scaled = jax.tree.map(lambda w: jnp.full_like(w, size**-0.5), params)
    a, _ = clipped.update(big, clipped.init(params), params)
    b, _ = free.update(scaled, free.init(params), params)
    assert_close(a.embed, b.embed, terms=10)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
def test_orthogonalize_keeps_singular_vectors_and_evens_values(rows: int, columns: int, seed: int) -> None:
    matrix = np.asarray(jax.random.normal(jax.random.key(seed), (rows, columns)), np.float64)
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    result = np.asarray(orthogonalize(jnp.asarray(matrix, jnp.float32), steps=5))
    mapped = u.T @ result @ vt.T
    off = mapped - np.diag(np.diag(mapped))
    # Of a value near 0, the first step and its rounding grow by the polynomial's slope, step by step.
    assert np.abs(off).max(initial=0) < tolerance(3 * 12, SLOPE**5)
    large = values > 0.05 * values.max()
    assert ((np.diag(mapped)[large] > 0.5) & (np.diag(mapped)[large] < 1.3)).all()


@pytest.mark.parametrize("axes", [None, MeshAxes(data=4), MeshAxes(data=2, model=2), MeshAxes(data=1, model=4)])
def test_muon_does_not_depend_on_the_mesh(axes: MeshAxes | None) -> None:
    optimizer = GrugOptimizer(GrugOptimizerConfig(kind="muon", learning_rate=0.1, warmup=0), 10)

    def update(params: Transformer) -> Transformer:
        grads = jax.tree.map(jnp.sin, params)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    expected = update(drawn())
    if axes is None:
        got = eqx.filter_jit(update)(drawn())
    else:
        with jax.set_mesh(create_mesh(4, axes)):
            got = eqx.filter_jit(lambda key: update(Transformer.init(SMALL_MODEL, key=key)))(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, terms=3 * 48, magnitude=SLOPE**5 * jnp.abs(b).max())


def test_muon_deals_out_its_layers_even_where_they_do_not_divide() -> None:
    transform = scale_by_muon(0.95, 5)

    def flops(layers: int, devices: int) -> float:
        with jax.set_mesh(create_mesh(devices, MeshAxes(), devices=jax.devices()[:devices])):
            grads = jnp.ones((layers, 64, 64), out_sharding=jax.P(None, "data", None))
            cost = jax.jit(transform.update).lower(grads, transform.init(grads)).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    one_layer = flops(1, 1)
    assert flops(3, 4) < 1.3 * one_layer
    assert flops(5, 4) < 2.3 * one_layer


def test_a_muon_update_is_as_large_as_an_adamw_update() -> None:
    optimizer = GrugOptimizer(GrugOptimizerConfig(kind="muon", learning_rate=1.0, warmup=0, weight_decay=0.0), 10)
    params = drawn()
    updates, _ = optimizer.update(jax.tree.map(jnp.sin, params), optimizer.init(params), params)
    assert 0.1 < float(jnp.sqrt(jnp.mean(updates.blocks.mlp.gate**2))) < 0.3


SCHEDULES: list[tuple[dict[str, Any], list[float]]] = [
    ({"schedule": "constant", "warmup": 2}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ({"schedule": "linear", "warmup": 0.2}, [0.5, 1, 1, 6.1 / 7, 5.2 / 7, 4.3 / 7, 3.4 / 7, 2.5 / 7, 1.6 / 7, 0.1]),
    ({"schedule": "wsd", "warmup": 2, "decay": 4}, [0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
    ({"schedule": "wsd", "warmup": 0, "decay": 0.4}, [1, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
    (
        {"schedule": "cosine", "warmup": 2},
        [0.5, 1, *(0.1 + 0.45 * (1 + np.cos(np.pi * i / 7)) for i in range(8))],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), SCHEDULES)
def test_schedules(fields: dict[str, Any], expected: list[float]) -> None:
    optimizer = GrugOptimizer(GrugOptimizerConfig(learning_rate=2.0, **fields), 10)
    assert_close([float(optimizer.learning_rate(step)) / 2 for step in range(10)], expected, terms=4)


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 \+ 4 steps, more than trainer.num_train_steps=10"):
        GrugOptimizerConfig(schedule="wsd", warmup=8, decay=4).build_schedule(10)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "adam"}, ["kind='adam'", "adamw, muon, lion, levanter"]),
        ({"schedule": "cosin"}, ["schedule='cosin'", "cosine"]),
        ({"learning_rate": 0.0}, ["learning_rate=0.0"]),
        ({"learning_rate": float("nan")}, ["learning_rate=nan"]),
        ({"weight_decay": -0.1}, ["weight_decay=-0.1"]),
        ({"beta1": 1.0}, ["beta1=1.0", "[0, 1)"]),
        ({"max_grad_norm": 0.0}, ["max_grad_norm=0.0", "null"]),
        ({"kind": "levanter"}, ["optimizer.levanter=None"]),
    ],
)
def test_bad_numbers_are_refused(fields: dict[str, Any], words: list[str]) -> None:
    with without_runtime_types(), pytest.raises(ValueError) as error:
        GrugOptimizerConfig(**fields)
    assert all(word in str(error.value) for word in words)


def levanter_config(name: str) -> GrugOptimizerConfig:
    from levanter.optim.config import OptimizerConfig

    kind = OptimizerConfig.get_choice_class(name)
    return GrugOptimizerConfig(kind="levanter", levanter=kind(learning_rate=0.01))


@pytest.mark.parametrize("name", ["adam", "lion", "cautious", "adopt"])
def test_levanters_optimizers_that_work_on_raw_arrays_train(name: str) -> None:
    optimizer, params = GrugOptimizer(levanter_config(name), 10), drawn()
    assert len(optimizer.routing(params)) == len(jax.tree.leaves(params))
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    assert float(optimizer.learning_rate(5)) > 0


@pytest.mark.parametrize("name", ["muon", "muonH", "adamH", "mini", "grug_muon", "scion"])
def test_levanters_optimizers_that_would_treat_matrices_as_embeddings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"would send matrices of the blocks to \['(adamw?|signum)'\].*kind='muon'"):
        GrugOptimizer(levanter_config(name), 10).routing(PARAMS)


@pytest.mark.parametrize("name", ["namo", "namoD"])
def test_levanters_optimizers_that_hide_their_routing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="hides which group"):
        GrugOptimizer(levanter_config(name), 10).routing(PARAMS)


@pytest.mark.parametrize("name", ["mars", "rmsprop", "soap", "kron"])
def test_levanters_optimizers_that_crash_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not run on raw arrays.*kind='adamw'"):
        GrugOptimizer(levanter_config(name), 10).routing(PARAMS)


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_wsd_ends_exactly_where_it_should(ratio: float) -> None:
    for steps in (10, 97, 1000):
        config = GrugOptimizerConfig(schedule="wsd", learning_rate=3e-3, min_lr_ratio=ratio, warmup=0)
        schedule = jax.jit(config.build_schedule(steps))
        rates = [float(schedule(jnp.asarray(step))) for step in (steps - 2, steps - 1, steps)]
        assert rates[1] == rates[2] == np.float32(3e-3 * ratio)
        assert rates[0] > rates[1]
