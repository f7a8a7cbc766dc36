from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import PyTree

from grug_native.language_model import abstract_parameters, parameter_kinds
from grug_native.model import Transformer
from grug_native.optimizer import (
    AdamWConfig,
    GroupConfig,
    GrugOptimizer,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
)
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import MeshAxes, create_mesh
from grug_native.state import init_train_state
from grug_native.train import train_step
from tests.fixtures_run import SMALL_MODEL, make_batch, without_runtime_types
from tests.tolerance import assert_close, assert_trees_close

PARAMS = abstract_parameters(SMALL_MODEL)
SLOPE = 3.4445
"""By how much a step of Muon's iteration enlarges a singular value near 0."""
NORMS = {".blocks.attn_norm.weight", ".blocks.mlp_norm.weight", ".final_norm.weight"}


def drawn() -> Transformer:
    return Transformer.init(SMALL_MODEL, key=jax.random.key(0))


CONFIGS: list[OptimizerConfig] = [AdamWConfig(), LionConfig(), MuonConfig()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_matrices_and_the_head_decay_and_nothing_else(config: OptimizerConfig) -> None:
    groups = {group.path: group for group in GrugOptimizer(config, 10).routing(PARAMS)}
    assert {path for path, group in groups.items() if "decay" not in group.group} == NORMS | {".embed"}
    assert groups[".blocks.attn.wq"].shape == (2, 32, 32)
    name = type(config).__name__.removesuffix("Config").lower()
    assert groups[".blocks.attn.wq"].group == f"{name}, rate 0.003, decay 0.1"
    assert groups[".embed"].group == f"{'adamw' if name == 'muon' else name}, rate 0.003"


GROUPED = {
    "embedding": GroupConfig(learning_rate=0.4),
    "head": GroupConfig(weight_decay=0.25),
    "norm": GroupConfig(weight_decay=0.125, learning_rate=0.2),
}


@pytest.mark.parametrize("kind", [AdamWConfig, LionConfig, MuonConfig])
@pytest.mark.parametrize("groups", [{}, GROUPED])
def test_what_the_groups_say_is_what_happens(kind: type, groups: dict[str, GroupConfig]) -> None:
    # With zero gradients, decay is all that moves a parameter.
    config = kind(schedule=ScheduleConfig(warmup=0), learning_rate=0.1, weight_decay=0.5, **groups)
    optimizer, params = GrugOptimizer(config, 10), jax.tree.map(lambda w: w + 1, drawn())
    updates, _ = eqx.filter_jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for group, update, param in zip(
        optimizer.routing(params), jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
    ):
        numbers = dict(part.rsplit(" ", 1) for part in group.group.split(", ")[1:])
        expected = -float(numbers["rate"]) * float(numbers.get("decay", 0)) * param
        assert_close(update, expected, terms=4)


def test_a_groups_own_rate_and_betas_are_those_of_an_optimizer_of_its_own() -> None:
    schedule = ScheduleConfig(warmup=0)
    grouped = AdamWConfig(
        schedule=schedule,
        max_grad_norm=None,
        head=GroupConfig(learning_rate=0.02, beta1=0.5, beta2=0.75, weight_decay=0.3),
    )
    alone = AdamWConfig(
        schedule=schedule, max_grad_norm=None, learning_rate=0.02, beta1=0.5, beta2=0.75, weight_decay=0.3
    )
    params = drawn()

    @eqx.filter_jit
    def third_update(config: AdamWConfig) -> Transformer:
        optimizer = GrugOptimizer(config, 10)
        state, updates = optimizer.init(params), params
        for step in range(3):
            grads = jax.tree.map(lambda w, step=step: jnp.cos(w + step), params)
            updates, state = optimizer.update(grads, state, params)
        return updates

    plain = replace(grouped, head=GroupConfig())
    ours, of_head, of_rest = third_update(grouped), third_update(alone), third_update(plain)
    assert_close(ours.head, of_head.head, terms=10)
    assert_trees_close(ours.blocks, of_rest.blocks, terms=10)


@dataclass(frozen=True)
class Extra:
    """An optimizer of one's own that looks at the loss and draws numbers."""

    def build_schedule(self, num_train_steps: int) -> optax.Schedule:
        return optax.constant_schedule(0.5)

    def build(self, num_train_steps: int) -> optax.GradientTransformationExtraArgs:
        def update(
            updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Any
        ) -> tuple[optax.Updates, optax.OptState]:
            noise = jax.random.uniform(extra["key"])
            return jax.tree.map(lambda u: jnp.full_like(u, extra["value"] + noise), updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    def groups(self, params: PyTree) -> PyTree:
        return jax.tree.map(lambda _: "mine", params)


def test_an_optimizer_of_ones_own_is_given_the_loss_and_a_key_of_the_step() -> None:
    optimizer, batch = GrugOptimizer(Extra(), 10), make_batch()
    state = init_train_state(SMALL_MODEL, optimizer, key=jax.random.key(0))
    noise = jax.random.uniform(jax.random.fold_in(state.training_key, 0))
    before = np.asarray(jax.tree.leaves(state.params)[0])
    state, metrics = train_step(optimizer, state, batch)
    assert_close(jax.tree.leaves(state.params)[0], before + metrics.loss + noise, terms=4)
    assert {group.group for group in optimizer.routing(state.params)} == {"mine"}
    assert metrics.learning_rate == 0.5


def decays(params: PyTree) -> PyTree:
    return jax.tree.map(lambda kind: kind in ("matrix", "head"), parameter_kinds(params))


def test_adamw_equals_optax() -> None:
    config = AdamWConfig(learning_rate=0.01, max_grad_norm=None, schedule=ScheduleConfig(shape="constant", warmup=0))
    params = drawn()
    grads = jax.tree.map(jnp.cos, params)
    ours, theirs = GrugOptimizer(config, 10), optax.adamw(0.01, b2=0.95, weight_decay=0.1, mask=decays)
    state, their_state = ours.init(params), theirs.init(params)
    update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
        expected, their_state = their_update(grads, their_state, params)
        # 1 - beta2 of the bias correction is rounded as the 1 is.
        assert_trees_close(updates, expected, terms=10)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    params = drawn()
    big = jax.tree.map(lambda w: 1024 * jnp.ones_like(w), params)  # its squares add up without rounding
    config = AdamWConfig(learning_rate=0.01, epsilon=1.0, weight_decay=0.0, schedule=ScheduleConfig(warmup=0))
    clipped, free = GrugOptimizer(config, 10), GrugOptimizer(replace(config, max_grad_norm=None), 10)
    size = sum(w.size for w in jax.tree.leaves(params))
    scaled = jax.tree.map(lambda w: jnp.full_like(w, size**-0.5), params)
    a, _ = jax.jit(clipped.update)(big, clipped.init(params), params)
    b, _ = jax.jit(free.update)(scaled, free.init(params), params)
    assert_close(a.embed, b.embed, terms=10)


@pytest.mark.parametrize("axes", [None, MeshAxes(data=4), MeshAxes(data=2, model=2), MeshAxes(data=1, expert=4)])
def test_muon_does_not_depend_on_the_mesh(axes: MeshAxes | None) -> None:
    optimizer = GrugOptimizer(MuonConfig(learning_rate=0.1, schedule=ScheduleConfig(warmup=0)), 10)

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


def test_a_muon_update_is_as_large_as_an_adamw_update() -> None:
    optimizer = GrugOptimizer(MuonConfig(learning_rate=1.0, weight_decay=0.0, schedule=ScheduleConfig(warmup=0)), 10)
    params = drawn()
    updates, _ = optimizer.update(jax.tree.map(jnp.sin, params), optimizer.init(params), params)
    assert 0.1 < float(jnp.sqrt(jnp.mean(updates.blocks.mlp.gate**2))) < 0.3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"learning_rate": 0.0}, ["learning_rate=0.0"]),
        ({"learning_rate": float("nan")}, ["learning_rate=nan"]),
        ({"weight_decay": -0.1}, ["weight_decay=-0.1"]),
        ({"beta1": 1.0}, ["beta1=1.0", "[0, 1)"]),
        ({"max_grad_norm": 0.0}, ["max_grad_norm=0.0", "null"]),
    ],
)
def test_bad_numbers_are_refused(fields: dict[str, Any], words: list[str]) -> None:
    with without_runtime_types(), pytest.raises(ValueError) as error:
        AdamWConfig(**fields)
    assert all(word in str(error.value) for word in words)


def test_bad_numbers_of_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match=r"beta2=1\.5 must lie in \[0, 1\)"):
        GroupConfig(beta2=1.5)
