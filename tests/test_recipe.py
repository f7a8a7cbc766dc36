"""The optimizers of the study of recipes, and the study itself at a toy size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.benchmarks import optimizers, recipe
from experiments.benchmarks.optimizers import Outcome, Study, Trial, run_row
from experiments.variants.recipe import (
    POLAR_EXPRESS,
    Decay,
    MatrixUpdate,
    RecipeConfig,
    add_cautious_decay,
    scale_by_soap,
    stay_on_sphere,
)
from grug_native.model import Transformer
from grug_native.muon import orthogonalize
from grug_native.optimizer import AdamWConfig, GroupConfig, GrugOptimizer, MuonConfig, OptimizerConfig
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import MeshAxes, create_mesh
from tests.fixtures_run import SMALL_MODEL
from tests.tolerance import assert_trees_close

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig

SCHEDULE = ScheduleConfig(warmup=0)
EMBEDDING, HEAD = GroupConfig(learning_rate=0.05), GroupConfig(learning_rate=0.02)
REST = AdamWConfig(schedule=SCHEDULE, max_grad_norm=None, embedding=EMBEDDING, head=HEAD)


@eqx.filter_jit
def third_update(config: OptimizerConfig, key: jax.Array) -> Transformer:
    params = Transformer.init(SMALL_MODEL, key=key)
    optimizer, updates = GrugOptimizer(config, 10), params
    state = optimizer.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda w, step=step: jnp.cos(7 * w + step), params)
        updates, state = optimizer.update(grads, state, params)
    return updates


@pytest.mark.parametrize(
    ("own", "librarys"),
    [
        (RecipeConfig(schedule=SCHEDULE, momentum=0.9, rest=REST), replace(REST, max_grad_norm=1.0)),
        (
            RecipeConfig(update="muon", schedule=SCHEDULE, rest=REST),
            MuonConfig(schedule=SCHEDULE, embedding=EMBEDDING, head=HEAD),
        ),
    ],
)
def test_the_plain_ones_are_the_librarys(own: RecipeConfig, librarys: AdamWConfig | MuonConfig) -> None:
    key = jax.random.key(0)
    assert_trees_close(third_update(own, key), third_update(librarys, key), terms=10)


@pytest.mark.parametrize(("update", "decay"), [("polar", "plain"), ("soap", "cautious"), ("adam", "sphere")])
def test_a_mesh_changes_nothing(update: MatrixUpdate, decay: Decay) -> None:
    config, key = RecipeConfig(update=update, decay=decay, schedule=SCHEDULE, rest=REST), jax.random.key(0)
    alone = third_update(config, key)
    with jax.set_mesh(create_mesh(4, MeshAxes(data=2, model=2))):
        spread = third_update(config, key)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        if update == "soap":  # Of wide matrices, rounding chooses the eigenvectors of eigenvalue 0.
            one, other = jnp.linalg.norm(one), jnp.linalg.norm(other)
        atol = (0.05 if update == "soap" else 1e-3) * float(jnp.abs(one).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(2, 24, 40), (40, 24)])
def test_polar_express_makes_matrices_orthogonal(shape: tuple[int, ...]) -> None:
    found = orthogonalize(jax.random.normal(jax.random.key(0), shape), steps=5, coefficients=POLAR_EXPRESS)
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.85 and values.max() < 1.15


def test_cautious_decay_only_helps_the_update() -> None:
    updates, params = jnp.array([1.0, 1.0, -1.0, 0.0]), jnp.array([2.0, -2.0, -2.0, 2.0])
    decay = add_cautious_decay(0.5)
    found, _ = decay.update(updates, decay.init(params), params)
    np.testing.assert_array_equal(found, [2.0, 1.0, -2.0, 0.0])


def test_a_step_on_the_sphere_has_its_length_and_keeps_the_norm() -> None:
    params = jax.random.normal(jax.random.key(0), (3, 8, 4))
    sphere = stay_on_sphere(optax.constant_schedule(0.1))
    found, _ = sphere.update(jax.random.normal(jax.random.key(1), params.shape), sphere.init(params), params)
    before, after, step = (np.linalg.norm(x, axis=(1, 2)) for x in (params, params + found, found))
    np.testing.assert_allclose(after, before, rtol=1e-5)
    np.testing.assert_allclose(step / before, 0.1, rtol=0.05)


def test_soap_is_adam_along_the_eigenvectors() -> None:
    rng = np.random.default_rng(0)
    scale = rng.normal(size=(4, 4)) @ np.diag([8.0, 4.0, 2.0, 1.0])
    soap, left, right = scale_by_soap(0.9, 0.8, every=3), np.zeros((4, 4)), np.zeros((4, 4))
    state, update = soap.init(jnp.zeros((4, 4))), jax.jit(soap.update)
    bases, mean, square = (np.eye(4), np.eye(4)), np.zeros((4, 4)), np.zeros((4, 4))
    for count in range(1, 9):
        g = scale @ rng.normal(size=(4, 4))
        found, state = update(jnp.asarray(g, jnp.float32), state)
        left, right, mean = 0.8 * left + 0.2 * g @ g.T, 0.8 * right + 0.2 * g.T @ g, 0.9 * mean + 0.1 * g
        expected = np.zeros((4, 4))
        if count > 1:
            square = 0.8 * square + 0.2 * (bases[0].T @ g @ bases[1]) ** 2
            along = bases[0].T @ mean @ bases[1] / (1 - 0.9**count) / np.sqrt(square / (1 - 0.8 ** (count - 1)))
            expected = bases[0] @ along @ bases[1].T
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2)
        if count == 1:
            bases = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
        elif count % 3 == 1:
            bases = np.linalg.qr(left @ bases[0])[0], np.linalg.qr(right @ bases[1])[0]


def test_all_families_draw_the_same_points() -> None:
    for number in range(20):
        points = [recipe.drawn(family, number) for family in recipe.FAMILIES.values()]
        assert len({(p.momentum, p.beta2, p.schedule, p.weight_decay) for p in points}) == 1
        for family, point in zip(recipe.FAMILIES.values(), points, strict=True):
            assert family.rates[0] <= point.learning_rate <= family.rates[1]
            assert (point.rest.head.learning_rate is not None) == family.grouped


def test_the_better_half_goes_on(
    tmp_path: Path, small_corpus: "LmDataConfig", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizers, "embedded_corpus", lambda cache_dir, **_: small_corpus)
    study = Study(model=SMALL_MODEL, batch_size=4, seeds=(0, 1), evaluations=1, eval_batch_size=4, eval_batches=1)
    family = recipe.FAMILIES[recipe.BASELINE]
    points = [recipe.drawn(family, number) for number in range(4)]
    known = {Trial(point, 1, 0): 2.0 - number / 10 for number, point in enumerate(points)}
    known |= {Trial(points[3], 2, 0): 1.5, Trial(points[2], 2, 0): 1.4}
    rows = [run_row(study, trial, Outcome(((trial.steps, bpb),), 1.0)) for trial, bpb in known.items()]
    (tmp_path / "runs.jsonl").write_text("".join(f"{row}\n" for row in rows))
    command = ["--runs", str(tmp_path / "runs.jsonl"), "--json", str(tmp_path / "numbers.json")]
    recipe.main([*command, "--families", recipe.BASELINE], study, rungs=((4, 1), (2, 2)))
    # Nothing was trained but the best of the last rung, with the seed that had chosen nothing.
    trained = [json.loads(row)["trial"] for row in (tmp_path / "runs.jsonl").read_text().splitlines()[len(rows) :]]
    assert (trained[0]["steps"], trained[0]["optimizer"]["momentum"]) == (2, points[2].momentum)
    assert {t["seed"] for t in trained} == {1}
    assert recipe.BASELINE in capsys.readouterr().out
    assert json.loads((tmp_path / "numbers.json").read_text())["steps to the baseline's end"][recipe.BASELINE] <= 2
