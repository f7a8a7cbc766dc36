"""A training step over plain arrays: the one compiled function of a run."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from grug_native.attention import Mask
from grug_native.kernels.backend import current_backend
from grug_native.language_model import LanguageModel, leaf_norms
from grug_native.loss import ComputeDtype, CrossEntropyName, next_token_loss
from grug_native.microbatches import batch_gradients
from grug_native.optimizer import GrugOptimizer
from grug_native.sharding import create_mesh as create_mesh
from grug_native.state import GrugTrainState
from grug_native.state import init_train_state as init_train_state
from grug_native.types import LmBatch

WATCHED = ("grad/norm/", "params/norm/", "updates/norm/")
"""How the names of what `watch_every` measures begin."""


@dataclass(frozen=True, kw_only=True)
class GrugStepConfig:
    """The numbers of a training step that belong neither to the model nor to the optimizer."""

    z_loss_weight: float = 0.0
    """Weight of the squared log-partition in the loss."""
    ema_beta: float | None = None
    """Decay of the parameters' moving average per step; None keeps none."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of the forward and backward pass; parameters and optimizer state stay in f32."""
    cross_entropy: CrossEntropyName = "auto"
    """Cross-entropy kernel, by name."""
    skip_nonfinite: bool = False
    """Leave the parameters and the optimizer as they were when a loss, gradient or update is not finite."""
    microbatch_size: int | None = None
    """Sequences, over all devices, of one forward and backward pass; a step adds up the gradients of as many passes as
    its batch needs. None makes one pass."""
    watch_every: int | None = None
    """Steps from one that measures the norms of each layer's weights to the next; None measures none."""


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
    extra: dict[str, Array] = eqx.field(default_factory=dict)
    """The model's own losses and metrics, and the norms that `watch_every` asks for: logged as they are."""


def train_step(
    optimizer: GrugOptimizer, state: GrugTrainState, batch: LmBatch, *, config: GrugStepConfig = GrugStepConfig()
) -> tuple[GrugTrainState, StepMetrics]:
    """One update. `state` is donated, so use the one returned.

    It is compiled once for each shape of batch, and waits for what it has done; a `CompiledStep` does not wait.

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
    return _train_step((optimizer, batch, config), state)


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
    step = jax.jit(lambda state, batch: _step((optimizer, batch, config), state), donate_argnums=0)
    return step.trace(state, batch).lower(lowering_platforms=platforms)


class PlainBatch(eqx.Module):
    """What a step takes of a batch, in classes of ours: so a step can be compiled while levanter is still imported."""

    tokens: Int[Array, "B S"]
    loss_weight: Float[Array, "B S"]
    attn_mask: Mask

    @staticmethod
    def of(batch: LmBatch) -> "PlainBatch":
        """The same batch."""
        mask = batch.attn_mask
        plain = Mask(mask.segment_ids, is_causal=mask.is_causal, sliding_window=mask.sliding_window)
        return PlainBatch(batch.tokens, batch.loss_weight, plain)

    @staticmethod
    def abstract(sequences: int, seq_len: int, *, packed: bool, sharding: NamedSharding) -> "PlainBatch":
        """Shapes and dtypes of a batch, laid out over a mesh."""

        def made() -> PlainBatch:
            ids = jnp.zeros((sequences, seq_len), jnp.int32)
            return PlainBatch(ids, jnp.zeros(ids.shape), Mask((ids, ids) if packed else None))

        shapes = jax.eval_shape(made)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


@final
class CompiledStep:
    """`train_step` of one shape of batch, compiled ahead: a call of it dispatches, and does not wait."""

    _result: jax.tree_util.PyTreeDef

    def __init__(
        self, optimizer: GrugOptimizer, state: GrugTrainState, batch: PlainBatch, config: GrugStepConfig
    ) -> None:
        """Compiles, for abstract arrays with their shardings; call it under the mesh."""
        hollow = [jax.tree.leaves(jax.tree.map(_hollow, tree)) for tree in (batch, state)]
        forms = jax.tree.structure(batch), jax.tree.structure(state)

        def step(batch_leaves: list[Array], state_leaves: list[Array]) -> list[Array]:
            batch, state = map(jax.tree.unflatten, forms, (batch_leaves, state_leaves))
            leaves, self._result = jax.tree.flatten(_step((optimizer, batch, config), state))
            return leaves

        # Lists of arrays: `filter_jit` takes what it is given apart four times, and modules take it a millisecond.
        program = cast(Any, eqx.filter_jit(step, donate="all-except-first")).lower(*hollow)
        self._program = program.compile()

    @property
    def executable(self) -> jax.stages.Compiled:
        """JAX's own, with the program's text and its use of memory."""
        return self._program.compiled

    def __call__(self, state: GrugTrainState, batch: LmBatch) -> tuple[GrugTrainState, StepMetrics]:
        """One update; `state` is donated."""
        leaves = self._program(jax.tree.leaves(PlainBatch.of(batch)), jax.tree.leaves(state))
        return jax.tree.unflatten(self._result, leaves)


def _hollow(leaf: jax.ShapeDtypeStruct) -> Array:
    """An array of that shape and sharding, without memory: `filter_jit` takes abstract ones for static arguments."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, leaf)
        return jax.random.wrap_key_data(_zeros(words.shape, words.dtype, leaf.sharding))
    array = _zeros(leaf.shape, leaf.dtype, leaf.sharding)
    array.delete()
    return array


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None) -> Array:
    """Made on each device by itself: of several processes, none waits for another here."""
    assert sharding is not None
    own = np.zeros(sharding.shard_shape(shape), dtype)
    parts = [jax.device_put(own, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _step(
    kept: tuple[GrugOptimizer, LmBatch, GrugStepConfig], state: GrugTrainState
) -> tuple[GrugTrainState, StepMetrics]:
    optimizer, batch, config = kept
    loss_of = partial(
        next_token_loss,
        z_loss_weight=config.z_loss_weight,
        compute_dtype=config.compute_dtype,
        cross_entropy=config.cross_entropy,
    )
    loss, aux, grads = batch_gradients(
        loss_of, state.params, batch, microbatch_size=config.microbatch_size, compute_dtype=config.compute_dtype
    )
    if current_backend().name == "gpu":
        # Else XLA joins the layers' gradients inside of the update, which then runs at a fifth of the memory's speed.
        grads = jax.lax.optimization_barrier(grads)
    key = jax.random.fold_in(state.training_key, state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss, key=key)
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
    watched = _watch(state.step, dict(zip(WATCHED, (grads, params, updates), strict=True)), config.watch_every)
    metrics = StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        update_norm=update_norm,
        param_norm=param_norm,
        learning_rate=optimizer.learning_rate(state.step),
        tokens=jnp.asarray(batch.tokens.size, jnp.int32),
        nonfinite=~finite,
        batch_digest=_digest(batch.tokens),
        extra=aux.losses | aux.metrics | watched,
    )
    next_state = GrugTrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        training_key=state.training_key,
        ema_params=_average(state.ema_params, params, config.ema_beta),
    )
    return next_state, metrics


_train_step: Any = eqx.filter_jit(_step, donate="all-except-first")


def _watch(step: Int[Array, ""], trees: dict[str, Any], every: int | None) -> dict[str, Array]:
    """Norms by layer and weight under levanter's names, as in `grad/norm/blocks.0.attn.wq`; NaN in between."""
    if every is None:
        return {}

    def measure() -> dict[str, Array]:
        norms: dict[str, Array] = {}
        for prefix, tree in trees.items():
            for name, norm in leaf_norms(tree).items():
                stack, _, rest = name.partition(".")
                names = [name] if norm.ndim == 0 else [f"{stack}.{layer}.{rest}" for layer in range(norm.size)]
                norms |= {f"{prefix}{n}": one for n, one in zip(names, jnp.ravel(norm), strict=True)}
        return norms

    nothing = jax.tree.map(lambda norm: jnp.full(norm.shape, jnp.nan), jax.eval_shape(measure))
    return jax.lax.cond(step % every == 0, measure, lambda: nothing)


def _digest(tokens: Int[Array, "B S"]) -> UInt32[Array, ""]:
    """A sum of tokens times odd numbers that depend on their position, modulo 2^32."""
    position = jnp.arange(tokens.size, dtype=jnp.uint32).reshape(tokens.shape)
    weight = (position * jnp.uint32(2_654_435_761)) | jnp.uint32(1)
    return jnp.sum((tokens.astype(jnp.uint32) + 1) * weight, dtype=jnp.uint32)


def _average(ema: LanguageModel | None, params: LanguageModel, beta: float | None) -> LanguageModel | None:
    if (ema is None) != (beta is None):
        raise ValueError(
            f"ema_beta={beta} but the state {'has no' if ema is None else 'has an'} ema_params: "
            "initialise the state with ema=(ema_beta is not None)"
        )
    if ema is None or beta is None:
        return None
    return jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, ema, params)
