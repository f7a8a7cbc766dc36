import jax
import jax.numpy as jnp
import optax
import pytest

from grug_native.language_model import abstract_parameters
from grug_native.levanter_optimizer import LevanterOptimizer
from grug_native.optimizer import GrugOptimizer
from tests.fixtures_run import SMALL_MODEL

PARAMS = abstract_parameters(SMALL_MODEL)


def levanter_config(name: str) -> LevanterOptimizer:
    from levanter.optim.config import OptimizerConfig

    kind = OptimizerConfig.get_choice_class(name)
    return LevanterOptimizer(levanter=kind(learning_rate=0.01))


@pytest.mark.parametrize("name", ["adam", "lion", "cautious", "adopt"])
def test_levanters_optimizers_that_work_on_raw_arrays_train(name: str) -> None:
    optimizer, params = GrugOptimizer(levanter_config(name), 10), SMALL_MODEL.init(key=jax.random.key(0))
    assert len(optimizer.routing(params)) == len(jax.tree.leaves(params))
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    assert float(optimizer.learning_rate(5)) > 0


@pytest.mark.parametrize("name", ["muon", "muonH", "adamH", "mini", "grug_muon", "scion"])
def test_levanters_optimizers_that_would_treat_matrices_as_embeddings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"would send matrices of the blocks to \['(adamw?|signum)'\].*type='muon'"):
        GrugOptimizer(levanter_config(name), 10).routing(PARAMS)


@pytest.mark.parametrize("name", ["namo", "namoD"])
def test_levanters_optimizers_that_hide_their_routing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="hides which group"):
        GrugOptimizer(levanter_config(name), 10).routing(PARAMS)


@pytest.mark.parametrize("name", ["mars", "rmsprop", "soap", "kron"])
def test_levanters_optimizers_that_crash_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not run on raw arrays.*type='adamw'"):
        GrugOptimizer(levanter_config(name), 10).routing(PARAMS)
