"""Optimizers over raw arrays, and the routing table that says which parameter gets which."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int, PyTree

from grug_native.mesh import constrain, explicit_mesh
from grug_native.model import parameter_kind
from grug_native.types import Scalar

if TYPE_CHECKING:
    from levanter.optim.config import OptimizerConfig as LevanterOptimizerConfig
else:  # Importing levanter takes seconds; a config that does not use it should not pay for it.
    LevanterOptimizerConfig = Any

OptimizerName = Literal["adamw", "muon", "lion", "levanter"]
"""The optimizers a config can name."""

ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
"""Shape of the learning rate after the warm-up; `wsd` is constant, then linear over the last `decay` steps."""

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic of Jordan et al. 2024 (kellerjordan.github.io/posts/muon), tuned for the steepest slope at zero."""


@dataclass(frozen=True, kw_only=True)
class GrugOptimizerConfig:
    """Optimizer and learning-rate schedule, as numbers."""

    kind: OptimizerName = "adamw"
    """Which optimizer; the matrices of the blocks go to it, and with `muon` everything else goes to AdamW."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    adam_learning_rate: float | None = None
    """Peak learning rate of what Muon leaves to AdamW; None means `learning_rate`."""
    schedule: ScheduleName = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: int | float = 0.01
    """Steps of linear warm-up: a count, or below 1 a fraction of the run."""
    decay: int | float = 0.2
    """Steps of the final decay of `wsd`: a count, or below 1 a fraction of the run."""
    min_lr_ratio: float = 0.1
    """The learning rate ends at this fraction of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay per unit of learning rate, on matrices and the head; never on embeddings and norms."""
    beta1: float = 0.9
    """Decay of the first moment (AdamW, Lion)."""
    beta2: float = 0.95
    """Decay of the second moment (AdamW); of the momentum (Lion)."""
    epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    momentum: float = 0.95
    """Decay of Muon's momentum, which is Nesterov's."""
    newton_schulz_steps: int = 5
    """Iterations of Muon's orthogonalisation."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm; None clips nothing."""
    levanter: LevanterOptimizerConfig | None = None
    """With `kind="levanter"`: one of levanter's optimizer configs. Its own numbers hold, and those above are unused."""

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(OptimizerName)), ("schedule", get_args(ScheduleName))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(known)}"
                )
        for name in ("learning_rate", "epsilon", "newton_schulz_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be positive")
        for name in ("warmup", "decay", "weight_decay", "min_lr_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm={self.max_grad_norm} must be positive, or null to clip nothing")
        if (self.kind == "levanter") != (self.levanter is not None):
            raise ValueError(
                f"optimizer.kind={self.kind!r} with optimizer.levanter={self.levanter!r}: "
                "one of levanter's optimizers needs kind='levanter' and its config in optimizer.levanter"
            )

    def build_schedule(self, num_train_steps: int, *, peak: float | None = None) -> optax.Schedule:
        """Learning rate as a function of the updates done so far.

        The first update already has a positive rate, and the last one the final rate.

        Raises:
            ValueError: if warm-up and decay do not fit in the run.
        """
        peak = self.learning_rate if peak is None else peak
        warmup = _steps(self.warmup, num_train_steps)
        rest = max(num_train_steps - warmup, 0)
        decay = {"constant": 0, "wsd": _steps(self.decay, num_train_steps)}.get(self.schedule, rest)
        if warmup + decay > num_train_steps:
            raise ValueError(
                f"optimizer.warmup={self.warmup} and optimizer.decay={self.decay} take {warmup} + {decay} steps, "
                f"more than trainer.num_train_steps={num_train_steps}"
            )
        final, span = peak * self.min_lr_ratio, max(decay - 1, 1)
        if self.schedule == "cosine":
            falling = optax.cosine_decay_schedule(peak, span, self.min_lr_ratio)
        else:
            straight = optax.linear_schedule(peak, final, span)
            # optax ends a rounding beside the last rate, and so below zero where that is 0.
            falling = lambda count: jnp.where(count >= span, final, straight(count))  # noqa: E731
        return optax.join_schedules(
            [
                lambda count: peak * (count + 1) / max(warmup, 1),
                optax.constant_schedule(peak),
                falling if decay else optax.constant_schedule(peak),
            ],
            [warmup, num_train_steps - decay],
        )

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """The optax transformation of a run of `num_train_steps` updates."""
        if self.levanter is not None:
            return self.levanter.build(num_train_steps)
        schedule = self.build_schedule(num_train_steps)
        clip = optax.identity() if self.max_grad_norm is None else optax.clip_by_global_norm(self.max_grad_norm)
        decay = optax.add_decayed_weights(self.weight_decay, mask=decay_mask)
        adam = optax.scale_by_adam(self.beta1, self.beta2, self.epsilon)
        if self.kind == "adamw":
            return optax.chain(clip, adam, decay, optax.scale_by_learning_rate(schedule))
        if self.kind == "lion":
            lion = optax.scale_by_lion(self.beta1, self.beta2)
            return optax.chain(clip, lion, decay, optax.scale_by_learning_rate(schedule))
        rest = self.build_schedule(num_train_steps, peak=self.adam_learning_rate)
        groups = {
            "muon": optax.chain(
                scale_by_muon(self.momentum, self.newton_schulz_steps), decay, optax.scale_by_learning_rate(schedule)
            ),
            "adamw": optax.chain(adam, decay, optax.scale_by_learning_rate(rest)),
        }
        return optax.chain(clip, optax.partition(groups, _muon_groups))


class Route(NamedTuple):
    """What an optimizer does to one parameter: a row of the routing table."""

    path: str
    """Where the parameter stands in the model, as in `.blocks.attn.wq`."""
    shape: tuple[int, ...]
    """Its shape; block parameters have a leading layer axis."""
    group: str
    """Which optimizer updates it."""
    decayed: bool
    """Whether weight decay applies to it."""


class GrugOptimizer(eqx.Module):
    """An optimizer for a run of known length: config and two pure functions. It holds no arrays."""

    config: GrugOptimizerConfig = eqx.field(static=True)
    num_train_steps: int = eqx.field(static=True)
    """Updates of the run, for its schedule."""

    def init(self, params: PyTree) -> optax.OptState:
        """Optimizer state for `params`, laid out like them."""
        return self.config.build(self.num_train_steps).init(params)

    def update[Params: PyTree](
        self, grads: Params, opt_state: optax.OptState, params: Params
    ) -> tuple[Params, optax.OptState]:
        """Turns gradients into updates, to be added to `params`, and the next optimizer state."""
        updates, opt_state = self.config.build(self.num_train_steps).update(grads, opt_state, params)
        return updates, opt_state

    def learning_rate(self, step: Int[Array, ""] | int) -> Scalar:
        """Learning rate of the update from `step` to `step + 1`."""
        levanter = self.config.levanter
        schedule = (
            self.config.build_schedule(self.num_train_steps)
            if levanter is None
            else levanter.lr_scheduler(self.num_train_steps)
        )
        return jnp.asarray(schedule(step), jnp.float32)

    def routing(self, params: PyTree) -> tuple[Route, ...]:
        """Which parameter is updated how.

        Args:
            params: the model; shapes suffice (`eqx.filter_eval_shape`).

        Raises:
            ValueError: if levanter's optimizer cannot run on raw arrays, or routes all of them to its fallback.
        """
        if self.config.levanter is not None:
            return _levanter_routing(self.config.levanter, self.num_train_steps, params)
        groups = (
            _muon_groups(params) if self.config.kind == "muon" else jax.tree.map(lambda _: self.config.kind, params)
        )
        decayed = jax.tree.map(lambda mask: mask and self.config.weight_decay > 0, decay_mask(params))
        return _table(params, groups, decayed)


def decay_mask(params: PyTree) -> PyTree:
    """True for what weight decay applies to: matrices and the head, but not embeddings and norms."""
    return jax.tree.map_with_path(lambda path, _: parameter_kind(path) in ("matrix", "head"), params)


def orthogonalize(matrices: Float[Array, "*batch M N"], *, steps: int) -> Float[Array, "*batch M N"]:
    """Moves each matrix towards the nearest semi-orthogonal one, by Newton-Schulz iterations.

    Its singular values end near 1 (between 0.7 and 1.2 after five steps), its singular vectors stay.

    References:
        Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Higham, Functions of Matrices, section 8.3.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = jnp.swapaxes(matrices, -1, -2) if tall else matrices
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`: the momentum, shaped like the parameters."""

    momentum: optax.Updates
    """A decayed sum of the gradients."""


def scale_by_muon(momentum: float, steps: int) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum for stacked matrices, scaled to the size of an AdamW update.

    The same on one device and on any mesh: under explicit axes the layers are dealt out over the `data` axis, each
    matrix whole, and with them as many empty ones as make the number divide.

    References:
        Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the factor 0.2 sqrt(max(M, N)), with which AdamW's
        learning rate and weight decay serve, is from Liu et al. 2025 (arXiv 2502.16982, section 2.2).
    """

    def init(params: optax.Params) -> ScaleByMuonState:
        return ScaleByMuonState(jax.tree.map(jnp.zeros_like, params))

    def direction(update: Float[Array, "L M N"]) -> Float[Array, "L M N"]:
        if not explicit_mesh():
            return _update_size(update) * orthogonalize(update, steps=steps)
        home, layers = jax.typeof(update).sharding.spec, update.shape[0]
        padding = -layers % get_abstract_mesh().shape["data"]
        dealt = constrain(jnp.pad(update, ((0, padding), (0, 0), (0, 0))), "data", None, None)
        whole = constrain(orthogonalize(dealt, steps=steps), None, *home[1:])
        return _update_size(update) * whole[:layers]

    def update(
        updates: optax.Updates, state: ScaleByMuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        del params
        mean = optax.tree.update_moment(updates, state.momentum, momentum, 1)
        nesterov = optax.tree.update_moment(updates, mean, momentum, 1)
        return jax.tree.map(direction, nesterov), ScaleByMuonState(mean)

    return optax.GradientTransformation(init, update)


def _update_size(update: Float[Array, "L M N"]) -> float:
    return 0.2 * max(update.shape[-2:]) ** 0.5


def _muon_groups(params: PyTree) -> PyTree:
    return jax.tree.map_with_path(lambda path, _: "muon" if parameter_kind(path) == "matrix" else "adamw", params)


def _steps(count_or_fraction: int | float, total: int) -> int:
    return int(count_or_fraction * total) if 0 < count_or_fraction < 1 else int(count_or_fraction)


def _table(params: PyTree, groups: PyTree, decayed: PyTree) -> tuple[Route, ...]:
    leaves = jax.tree.leaves_with_path(params)
    return tuple(
        Route(jax.tree_util.keystr(path), leaf.shape, group, decay)
        for (path, leaf), group, decay in zip(leaves, jax.tree.leaves(groups), jax.tree.leaves(decayed), strict=True)
    )


def _levanter_routing(config: LevanterOptimizerConfig, num_train_steps: int, params: PyTree) -> tuple[Route, ...]:
    name = type(config).__name__
    shapes = eqx.filter_eval_shape(lambda tree: tree, params)
    # levanter's multi-group optimizers label parameters by haliax's module classes, which raw arrays do not have.
    label = getattr(config, "create_mask", None)
    groups = jax.tree.map(lambda _: name, shapes) if label is None else label(shapes)
    kinds = jax.tree.leaves(jax.tree.map_with_path(lambda path, _: parameter_kind(path), shapes))
    labelled = list(zip(kinds, jax.tree.leaves(groups), strict=True))
    shared = {group for kind, group in labelled if kind == "matrix"} & {g for kind, g in labelled if kind != "matrix"}
    if label is not None and shared:
        raise ValueError(
            f"optimizer.levanter={name} would send matrices of the blocks to {sorted(shared)}, as it does embedding or "
            "norms: it looks for haliax layers and finds raw arrays. Use kind='muon' instead"
        )
    transform = config.build(num_train_steps)
    try:
        state = eqx.filter_eval_shape(transform.init, shapes)
        eqx.filter_eval_shape(transform.update, shapes, state, shapes)
    except Exception as error:
        raise ValueError(
            f"optimizer.levanter={name} does not run on raw arrays ({type(error).__name__}: {error}): "
            "use kind='adamw', 'muon' or 'lion', or levanter's adam, lion, cautious or adopt"
        ) from error
    if label is None and any(map(_is_partition, jax.tree.leaves(state, is_leaf=_is_partition))):
        raise ValueError(f"optimizer.levanter={name} hides which group a parameter goes to: use kind='muon' instead")
    mask = config.build_weight_decay_mask()
    decayed = jax.tree.map(lambda _: True, shapes) if mask is None else mask(shapes)
    return _table(shapes, groups, jax.tree.map(lambda leaf: bool(leaf) and config.weight_decay > 0, decayed))


def _is_partition(node: object) -> bool:
    return isinstance(node, optax.transforms.PartitionState)
