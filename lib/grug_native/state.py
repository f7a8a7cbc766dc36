"""The whole state of a run between two steps: one pytree of arrays."""

from typing import override

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Int, PRNGKeyArray

from grug_native.language_model import LanguageModel, ModelConfig
from grug_native.optimizer import GrugOptimizer


class GrugTrainState(eqx.Module):
    """State after `step` updates; a pure function of config, seed and `step` on a fixed mesh."""

    step: Int[Array, ""]
    """Updates done, and so the index of the next batch."""
    params: LanguageModel
    """Parameters, in f32."""
    opt_state: optax.OptState
    """Moments and counters of the optimizer."""
    training_key: PRNGKeyArray
    """Base key of the run; the key of a step is `fold_in(training_key, step)`."""
    ema_params: LanguageModel | None
    """Exponential moving average of the parameters, when the run keeps one."""

    @override
    def __repr__(self) -> str:
        # While tracing, or as an abstract array, the step has no number yet.
        concrete = eqx.is_array(self.step) and not isinstance(self.step, Tracer)
        step = "?" if not concrete else "deleted" if is_deleted(self) else int(self.step)
        sizes = ", ".join(f"{n}: {_numbers(getattr(self, n)):,} numbers" for n in ("params", "opt_state", "ema_params"))
        return f"GrugTrainState(step={step}, {sizes})"


def is_deleted(state: GrugTrainState) -> bool:
    """Whether a step has taken the memory of a state, or of some of it: JAX spares what somebody has looked at."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _numbers(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@eqx.filter_jit
def init_train_state(
    model: ModelConfig, optimizer: GrugOptimizer, *, key: PRNGKeyArray, ema: bool = False
) -> GrugTrainState:
    """Draws the state of step 0, laid out over the ambient mesh (`jax.set_mesh`) if there is one.

    Args:
        model: config of the model.
        optimizer: whose state is made.
        key: all randomness of the run derives from it.
        ema: whether to keep a moving average of the parameters; it starts at the parameters.
    """
    init_key, training_key = jax.random.split(key)
    return _first_state(model.init(key=init_key), optimizer, training_key, ema)


def start_train_state(
    params: LanguageModel, optimizer: GrugOptimizer, *, key: PRNGKeyArray, ema: bool = False
) -> GrugTrainState:
    """The state of step 0 with parameters that are there; all else is as `init_train_state` makes it."""
    state = _other_parts(params, optimizer, key, ema)
    return eqx.tree_at(lambda state: state.params, state, params, is_leaf=lambda node: node is None)


@eqx.filter_jit
def _other_parts(params: LanguageModel, optimizer: GrugOptimizer, key: PRNGKeyArray, ema: bool) -> GrugTrainState:
    state = _first_state(params, optimizer, jax.random.split(key)[1], ema)
    return eqx.tree_at(lambda state: state.params, state, None)


def _first_state(
    params: LanguageModel, optimizer: GrugOptimizer, training_key: PRNGKeyArray, ema: bool
) -> GrugTrainState:
    return GrugTrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        training_key=training_key,
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )
