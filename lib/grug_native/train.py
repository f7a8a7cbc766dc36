"""The one compiled function of a run: a training step over plain arrays."""

from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from grug_native.backend import current_backend
from grug_native.loss import ComputeDtype, next_token_loss
from grug_native.model import Transformer
from grug_native.optimizer import GrugOptimizer
from grug_native.state import GrugTrainState
from grug_native.types import LmBatch


@dataclass(frozen=True, kw_only=True)
class GrugStepConfig:
    """The numbers of a training step that belong neither to the model nor to the optimizer."""

    z_loss_weight: float = 0.0
    """Weight of the squared log-partition in the loss."""
    ema_beta: float | None = None
    """Decay of the parameters' moving average per step; None keeps none."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of the forward and backward pass; parameters and optimizer state stay in f32."""
    skip_nonfinite: bool = False
    """Leave the parameters and the optimizer as they were when a loss, gradient or update is not finite."""


class StepMetrics(eqx.Module):
    """What a step reports. Reading a field waits for the step; passing it on does not."""

    loss: Float[Array, ""]
    """Mean nats a predicted token, z-loss included, before the update."""
    grad_norm: Float[Array, ""]
    """Global L2 norm of the gradients, before clipping."""
    update_norm: Float[Array, ""]
    """Global L2 norm of what was added to the parameters."""
    param_norm: Float[Array, ""]
    """Global L2 norm of the parameters after the update."""
    learning_rate: Float[Array, ""]
    """Learning rate of this update."""
    tokens: Int[Array, ""]
    """Token positions in the batch, padding included."""
    nonfinite: Bool[Array, ""]
    """Whether the loss, a gradient, an update or a new parameter is not finite."""
    batch_digest: UInt32[Array, ""]
    """A hash of the tokens, the same on every mesh; equal runs have equal digests at every step."""


def train_step(
    optimizer: GrugOptimizer, state: GrugTrainState, batch: LmBatch, *, config: GrugStepConfig = GrugStepConfig()
) -> tuple[GrugTrainState, StepMetrics]:
    """One update. Compiled once per batch shape; `state` is donated, so use the one returned.

    Args:
        optimizer: how gradients become updates.
        state: its buffers are reused: reading it afterwards raises JAX's "Array has been deleted".
        batch: a `GrugLmExample` of shape (B, S); it stays valid.
        config: loss and averaging.

    Returns:
        The next state, and what the step reports.

    Raises:
        jaxtyping.TypeCheckError: if a field of the batch has the wrong shape or dtype.
    """
    return _train_step(optimizer, state, batch, config)


def lower_train_step(
    optimizer: GrugOptimizer,
    state: GrugTrainState,
    batch: LmBatch,
    *,
    config: GrugStepConfig = GrugStepConfig(),
    platforms: tuple[str, ...] | None = None,
) -> jax.stages.Lowered:
    """The computation of `train_step`, lowered and not compiled.

    Args:
        optimizer: how gradients become updates.
        state: arrays, or abstract ones (`jax.ShapeDtypeStruct`) with their shardings.
        batch: likewise.
        config: loss and averaging.
        platforms: for which, as in `("cuda",)`: they need not be here. None means that of the devices.
    """
    return _train_step.trace(optimizer, state, batch, config).lower(lowering_platforms=platforms)


# Not `eqx.filter_jit`: it waits for what it has dispatched, and the host would have nothing to do beside the device.
@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _train_step(
    optimizer: GrugOptimizer, state: GrugTrainState, batch: LmBatch, config: GrugStepConfig
) -> tuple[GrugTrainState, StepMetrics]:
    loss, grads = jax.value_and_grad(
        lambda params: next_token_loss(
            params, batch, z_loss_weight=config.z_loss_weight, compute_dtype=config.compute_dtype
        )
    )(state.params)
    if current_backend().name == "gpu":
        # Else XLA joins the layers' gradients inside of the update, which then runs at a fifth of the memory's speed.
        grads = jax.lax.optimization_barrier(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm, update_norm, param_norm = map(optax.global_norm, (grads, updates, params))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm) & jnp.isfinite(param_norm)
    if config.skip_nonfinite:
        # Counters go on, so that the learning rate stays a function of the step.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new,
            (params, opt_state),
            (state.params, state.opt_state),
        )
    metrics = StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        update_norm=update_norm,
        param_norm=param_norm,
        learning_rate=optimizer.learning_rate(state.step),
        tokens=jnp.asarray(batch.tokens.size, jnp.int32),
        nonfinite=~finite,
        batch_digest=_digest(batch.tokens),
    )
    next_state = GrugTrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        training_key=state.training_key,
        ema_params=_average(state.ema_params, params, config.ema_beta),
    )
    return next_state, metrics


def _digest(tokens: Int[Array, "B S"]) -> UInt32[Array, ""]:
    """A sum of tokens times odd numbers that depend on their position, modulo 2^32."""
    position = jnp.arange(tokens.size, dtype=jnp.uint32).reshape(tokens.shape)
    weight = (position * jnp.uint32(2_654_435_761)) | jnp.uint32(1)
    return jnp.sum((tokens.astype(jnp.uint32) + 1) * weight, dtype=jnp.uint32)


def _average(ema: Transformer | None, params: Transformer, beta: float | None) -> Transformer | None:
    if (ema is None) != (beta is None):
        raise ValueError(
            f"ema_beta={beta} but the state {'has no' if ema is None else 'has an'} ema_params: "
            "initialise the state with ema=(ema_beta is not None)"
        )
    if ema is None or beta is None:
        return None
    return jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, ema, params)
