import equinox as eqx
import jax
import numpy as np

from grug_native.optimizer import AdamWConfig, GrugOptimizer
from grug_native.sharding import create_mesh
from grug_native.state import GrugTrainState, init_train_state
from tests.fixtures_run import SMALL_MODEL, llama
from tests.tolerance import DRAW_TERMS, assert_close

OPTIMIZER = GrugOptimizer(AdamWConfig(), 10)


def init(seed: int = 0, *, ema: bool = False) -> GrugTrainState:
    return init_train_state(SMALL_MODEL, OPTIMIZER, key=jax.random.key(seed), ema=ema)


def test_a_state_is_a_function_of_its_seed() -> None:
    first, again, other = init(), init(), init(1)
    np.testing.assert_array_equal(llama(first.params).embed, llama(again.params).embed)
    assert not np.array_equal(llama(first.params).embed, llama(other.params).embed)
    assert int(first.step) == 0
    assert jax.random.key_data(first.training_key).tolist() == jax.random.key_data(again.training_key).tolist()


def test_the_average_starts_at_the_parameters_in_memory_of_its_own() -> None:
    state = init(ema=True)
    assert init().ema_params is None
    assert state.ema_params is not None
    np.testing.assert_array_equal(llama(state.ema_params).head, llama(state.params).head)
    assert llama(state.ema_params).head.unsafe_buffer_pointer() != llama(state.params).head.unsafe_buffer_pointer()


def test_optimizer_state_lies_like_the_parameters() -> None:
    alone = init()
    with jax.set_mesh(create_mesh(4)):
        state = init()
    assert_close(llama(state.params).embed, llama(alone.params).embed, terms=DRAW_TERMS)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (300, 32)]
    assert specs == [jax.P("model", "data")] * 2


def test_a_state_is_short_to_print() -> None:
    state = init()
    sizes = "params: 34,720 numbers, opt_state: 69,442 numbers, ema_params: 0 numbers"
    assert repr(state) == f"GrugTrainState(step=0, {sizes})"
    assert repr(eqx.filter_eval_shape(lambda: state)) == f"GrugTrainState(step=?, {sizes})"
    state.step.delete()
    assert repr(state) == f"GrugTrainState(step=deleted, {sizes})"
