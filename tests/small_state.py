"""A train state of a few kilobytes with the fields of the real one, for the tests of checkpoints."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grug_native.checkpoint.checkpointer import CheckpointPolicy, GrugCheckpointer
from grug_native.checkpoint.metadata import CheckpointMetadata, RunIdentity, describe
from grug_native.checkpoint.orbax_io import OrbaxCheckpointIO

RUN_ID = "small"
IDENTITY = RunIdentity(
    run_id=RUN_ID,
    config={"model": {"width": 8}, "optimizer": {"learning_rate": 0.001}, "trainer": {"log_every": 1}},
    data_fingerprint="data-1",
    tokenizer_digest="tokenizer-1",
    mesh={"data": 1},
    cosmetic=("trainer.log_every",),
)
OPTIMIZER = optax.adamw(1e-3)


class SmallParams(eqx.Module):
    embed: Float[Array, "V D"]
    bias: Float[Array, " D"]


class SmallState(eqx.Module):
    step: Int[Array, ""]
    params: SmallParams
    opt_state: optax.OptState
    training_key: PRNGKeyArray
    ema_params: SmallParams | None


def make_state(step: int = 0, *, width: int = 8, ema: bool = False, seed: int = 0) -> SmallState:
    """A state whose every array depends on `step`."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    params = SmallParams(jax.random.normal(key, (16, width)), jnp.full((width,), step, jnp.bfloat16))
    opt_state = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(step, leaf.dtype), OPTIMIZER.init(eqx.filter(params, eqx.is_array))
    )
    return SmallState(jnp.asarray(step, jnp.int32), params, opt_state, key, params if ema else None)


def state_shape(*, width: int = 8, ema: bool = False) -> SmallState:
    return eqx.filter_eval_shape(make_state, width=width, ema=ema)


def make_metadata(step: int) -> CheckpointMetadata:
    return describe(IDENTITY, "permanent", step=step, data_offset=8 * step)


def save_step(folder: Path, step: int, *, state: SmallState | None = None) -> Path:
    """Commits a checkpoint of `step` in `folder`, without a checkpointer around it."""
    path = folder / f"step-{step}"
    OrbaxCheckpointIO().save(path, make_state(step) if state is None else state, metadata=make_metadata(step))()
    return path


def make_checkpointer(run: Path, *, keep_last: int = 1) -> GrugCheckpointer:
    return GrugCheckpointer(run, IDENTITY, CheckpointPolicy(keep_last=keep_last))
