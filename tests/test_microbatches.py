import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jaxtyping import Array

from grug_native.kernels.backend import Backend
from grug_native.kernels.choices import noted_choices
from grug_native.language_model import LanguageModel, ModelConfig
from grug_native.loss import next_token_loss
from grug_native.microbatches import batch_gradients, check_microbatch_size, reduce_once, split_batch
from grug_native.optimizer import GrugOptimizer, MuonConfig
from grug_native.sharding import MeshAxes, batch_sharding, create_mesh
from grug_native.state import init_train_state
from grug_native.train import GrugStepConfig, PlainBatch, train_step
from tests.fixtures_run import SMALL_MIXTURE, SMALL_MODEL, make_batch

MIXTURE = replace(SMALL_MIXTURE, num_layers=1, balance_weight=0.0, router_z_weight=1e-2)
"""Its own loss is a mean over tokens."""

type Gradients = tuple[Array, dict[str, Array], LanguageModel]


def unequal_batch(*, packed: bool) -> PlainBatch:
    """Rows that weigh differently, the last ones nothing: a mean of means is far from the mean."""
    batch = PlainBatch.of(make_batch(batch=16, packed=packed))
    weight = jax.random.uniform(jax.random.key(7), batch.tokens.shape) * batch.loss_weight
    return replace(batch, loss_weight=weight.at[:4].multiply(5.0).at[12:].set(0.0))


def relative_error(actual: object, expected: object) -> float:
    """L2 norm of the difference, of all leaves together."""

    def norm(leaves: list[np.ndarray]) -> float:
        return sum(float(np.sum(np.square(leaf))) for leaf in leaves) ** 0.5

    ours, theirs = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (actual, expected))
    return norm([a - b for a, b in zip(ours, theirs, strict=True)]) / norm(theirs)


@pytest.mark.parametrize(
    ("model", "packed", "axes"),
    [
        (SMALL_MODEL, True, None),
        (SMALL_MODEL, True, MeshAxes(data=2, model=2)),
        (SMALL_MODEL, False, MeshAxes(replica_dcn=4, data=1)),
        (replace(SMALL_MODEL, scan_layers=True), False, MeshAxes(replica_dcn=2, data=2)),
        (MIXTURE, False, MeshAxes(data=2, expert=2)),
    ],
)
def test_parts_add_up_to_the_whole(model: ModelConfig, packed: bool, axes: MeshAxes | None) -> None:
    mesh = None if axes is None else create_mesh(16, axes, devices=jax.devices()[:4])
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        params, batch = model.init(key=jax.random.key(0)), unequal_batch(packed=packed)
        batch = batch if mesh is None else jax.device_put(batch, batch_sharding(mesh))
        kernel = "blockwise" if packed else "full"
        loss = partial(next_token_loss, z_loss_weight=1e-2, cross_entropy=kernel)

        @partial(jax.jit, static_argnums=2)
        def gradients(
            params: LanguageModel, batch: PlainBatch, size: int | None
        ) -> tuple[Array, dict[str, Array], object]:
            value, aux, grads = batch_gradients(loss, params, batch, microbatch_size=size, compute_dtype="float32")
            return value, aux.losses, grads

        whole, parts = gradients(params, batch, None), gradients(params, batch, 4)
        assert jax.tree.map(jax.typeof, parts) == jax.tree.map(jax.typeof, whole)
    assert relative_error(parts[:2], whole[:2]) < 1e-6
    assert relative_error(parts[2], whole[2]) < 1e-6


def test_a_step_of_parts_is_the_step() -> None:
    optimizer = GrugOptimizer(MuonConfig(learning_rate=0.01), 10)
    batch, states = unequal_batch(packed=False), []
    for size in (None, 4):
        state = init_train_state(SMALL_MODEL, optimizer, key=jax.random.key(0), ema=True)
        config = GrugStepConfig(ema_beta=0.5, skip_nonfinite=True, microbatch_size=size)
        state, metrics = train_step(optimizer, state, batch, config=config)
        states.append((state.params, state.ema_params, metrics.grad_norm, metrics.batch_digest))
    assert relative_error(states[1], states[0]) < 1e-6


def collectives(text: str) -> list[tuple[bool, str]]:
    """Whether it stands in the loop, and the result, of each collective of a compiled program."""
    found = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter|all-gather)\(.*op_name=\"([^\"]*)", text)
    return [("/while/" in name, result) for result, name in found]


@pytest.mark.parametrize("room", [True, False])
def test_devices_add_up_once_a_step_where_there_is_room(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 2**30 if room else 2**10
    monkeypatch.setattr("grug_native.microbatches.current_backend", lambda: Backend("cpu", memory=memory))
    mesh = create_mesh(16, MeshAxes(data=4), devices=jax.devices()[:4])
    with jax.set_mesh(mesh), noted_choices() as choices:
        params = SMALL_MODEL.init(key=jax.random.key(0))
        batch = jax.device_put(unequal_batch(packed=False), batch_sharding(mesh))

        @jax.jit
        def gradients(params: LanguageModel, batch: PlainBatch) -> LanguageModel:
            loss = partial(next_token_loss, cross_entropy="full")
            return batch_gradients(loss, params, batch, microbatch_size=4, compute_dtype="float32")[2]

        compiled = gradients.lower(params, batch).compile()
        expected = jax.jit(jax.grad(lambda params: next_token_loss(params, batch, cross_entropy="full")[0]))(params)
        assert relative_error(compiled(params, batch), expected) < 1e-6
    assert any(looped for looped, _ in collectives(compiled.as_text() or "")) != room
    assert ("once a step" in choices["gradients"].name) == room


def test_a_device_keeps_its_sequences() -> None:
    mesh = create_mesh(8, MeshAxes(data=4), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        batch = jax.device_put(PlainBatch.of(make_batch(batch=8)), batch_sharding(mesh))
        parts = jax.jit(split_batch, static_argnums=1)(batch, 2)
    for whole, part in zip(batch.tokens.addressable_shards, parts.tokens.addressable_shards, strict=True):
        assert part.device == whole.device and part.data.shape == (2, 1, 32)
        np.testing.assert_array_equal(part.data[:, 0], whole.data)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (3, ["microbatch_size=3", "batch of 8"]),
        (0, ["=0"]),
        (2, ["microbatch_size=2", "4 data-parallel", "multiple of 4"]),
    ],
)
def test_parts_that_do_not_divide_are_refused(size: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        check_microbatch_size(size, 8, 4)
    assert all(word in str(error.value) for word in words)


def test_one_device_has_nothing_to_add_up() -> None:
    assert not reduce_once(SMALL_MODEL.init(key=jax.random.key(0)), "float32", Backend("cpu"))
