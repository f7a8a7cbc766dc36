"""The contract of an optimizer, and our own ones.

An optimizer is a frozen config that builds an optax transformation. One of your own needs no more: give it in a config
file as `type: package.module:Class`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from grug_native.language_model import ParameterKind, parameter_kinds
from grug_native.muon import scale_by_muon
from grug_native.schedule import ScheduleConfig
from grug_native.types import Scalar


@runtime_checkable
class OptimizerConfig(Protocol):
    """What an optimizer's config has to have. It is a frozen dataclass of plain data."""

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """The optax transformation of a run of `num_train_steps` updates.

        Its `update` may take extra arguments (`GradientTransformationExtraArgs`): the loss as `value`, and a random
        `key` of the step.
        """
        ...

    def build_schedule(self, num_train_steps: int) -> optax.Schedule:
        """The learning rate that is logged; a `ValueError` says why the schedule does not fit in the run."""
        ...

    def groups(self, params: PyTree) -> PyTree:
        """In the tree of the parameters, what is done to each in a few words: `adamw, rate 0.003, decay 0.1`."""
        ...


type _Own = AdamWConfig | LionConfig | MuonConfig


def _check_numbers(prefix: str, config: "GroupConfig | _Own") -> None:
    for name in ("learning_rate", "adam_learning_rate", "epsilon", "newton_schulz_steps", "max_grad_norm"):
        value = getattr(config, name, None)
        if value is not None and not 0 < value < math.inf:
            way_out = ", or null to clip nothing" if name == "max_grad_norm" else ""
            raise ValueError(f"{prefix}{name}={value} must be positive{way_out}")
    if config.weight_decay is not None and not 0 <= config.weight_decay < math.inf:
        raise ValueError(f"{prefix}weight_decay={config.weight_decay} must not be negative")
    for name in ("beta1", "beta2", "momentum"):
        value = getattr(config, name, None)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{prefix}{name}={value} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """The numbers of one kind of parameters, where they are other than the optimizer's."""

    learning_rate: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """Decoupled weight decay per unit of learning rate."""
    beta1: float | None = None
    """Decay of the first moment."""
    beta2: float | None = None
    """Decay of the second moment."""

    def __post_init__(self) -> None:
        _check_numbers("a group's ", self)


_NO_DECAY = GroupConfig(weight_decay=0.0)
_COSINE = ScheduleConfig()


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW for all parameters, with numbers of their own for each kind where you give them.

    References:
        Loshchilov and Hutter 2019 (arXiv 1711.05101).
    """

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: ScheduleConfig = _COSINE
    """How the rates go over the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay per unit of learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm; None clips nothing."""
    embedding: GroupConfig = _NO_DECAY
    head: GroupConfig = GroupConfig()
    matrix: GroupConfig = GroupConfig()
    norm: GroupConfig = _NO_DECAY

    def __post_init__(self) -> None:
        _check_numbers("optimizer.", self)

    def build_schedule(self, num_train_steps: int) -> optax.Schedule:
        """The learning rate of what has none of its own."""
        return self.schedule.build(num_train_steps, peak=self.learning_rate)

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Clipping, moments, decay and rate, one after the other."""
        return optax.chain(_clip(self), *_scaled(self, _adam(self), self.build_schedule(num_train_steps)))

    def groups(self, params: PyTree) -> PyTree:
        """By kind."""
        return jax.tree.map(lambda kind: _describe("adamw", self, kind), parameter_kinds(params))


@dataclass(frozen=True, kw_only=True)
class LionConfig:
    """Lion for all parameters.

    References:
        Chen et al. 2023 (arXiv 2302.06675).
    """

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: ScheduleConfig = _COSINE
    """How the rates go over the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay per unit of learning rate."""
    beta1: float = 0.9
    """Share of the momentum in the direction of an update."""
    beta2: float = 0.95
    """Decay of the momentum."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm; None clips nothing."""
    embedding: GroupConfig = _NO_DECAY
    head: GroupConfig = GroupConfig()
    matrix: GroupConfig = GroupConfig()
    norm: GroupConfig = _NO_DECAY

    def __post_init__(self) -> None:
        _check_numbers("optimizer.", self)

    def build_schedule(self, num_train_steps: int) -> optax.Schedule:
        """The learning rate of what has none of its own."""
        return self.schedule.build(num_train_steps, peak=self.learning_rate)

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Clipping, signs of the momentum, decay and rate, one after the other."""
        lion = _by_betas(self, optax.scale_by_lion)
        return optax.chain(_clip(self), *_scaled(self, lion, self.build_schedule(num_train_steps)))

    def groups(self, params: PyTree) -> PyTree:
        """By kind."""
        return jax.tree.map(lambda kind: _describe("lion", self, kind), parameter_kinds(params))


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the matrices of the blocks, and AdamW for everything else; see `scale_by_muon`."""

    learning_rate: float = 3e-3
    """Peak learning rate of the matrices."""
    adam_learning_rate: float | None = None
    """Peak learning rate of what is left to AdamW; None means `learning_rate`."""
    schedule: ScheduleConfig = _COSINE
    """How the rates go over the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay per unit of learning rate."""
    momentum: float = 0.95
    """Decay of Muon's momentum, which is Nesterov's."""
    newton_schulz_steps: int = 5
    """Iterations of the orthogonalisation."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm; None clips nothing."""
    embedding: GroupConfig = _NO_DECAY
    head: GroupConfig = GroupConfig()
    norm: GroupConfig = _NO_DECAY
    """Of norms and other vectors, as above of other kinds."""

    def __post_init__(self) -> None:
        _check_numbers("optimizer.", self)

    def build_schedule(self, num_train_steps: int) -> optax.Schedule:
        """The learning rate of the matrices."""
        return self.schedule.build(num_train_steps, peak=self.learning_rate)

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Clipping, then Muon or AdamW, each with decay and a rate of its own."""
        adam_rate = self.learning_rate if self.adam_learning_rate is None else self.adam_learning_rate
        of_rest = self.schedule.build(num_train_steps, peak=adam_rate)
        muon = scale_by_muon(self.momentum, self.newton_schulz_steps)
        parts = {
            "muon": optax.chain(
                muon, _decay_and_rates(self), optax.scale_by_learning_rate(self.build_schedule(num_train_steps))
            ),
            "adamw": optax.chain(*_scaled(self, _adam(self), of_rest)),
        }
        return optax.chain(_clip(self), optax.partition(parts, _muon_or_adamw))

    def groups(self, params: PyTree) -> PyTree:
        """By kind."""
        return jax.tree.map(
            lambda kind: _describe("muon" if kind == "matrix" else "adamw", self, kind), parameter_kinds(params)
        )


class ParamGroup(NamedTuple):
    """What an optimizer does to one parameter."""

    path: str
    """Where the parameter stands in the model, as in `.blocks.attn.wq`."""
    shape: tuple[int, ...]
    """Its shape; block parameters have a leading layer axis."""
    group: str
    """What is done to it, in words."""


class GrugOptimizer(eqx.Module):
    """An optimizer for a run of known length: config and two pure functions. It holds no arrays."""

    config: OptimizerConfig = eqx.field(static=True)
    num_train_steps: int = eqx.field(static=True)
    """Updates of the run, for its schedule."""

    def init(self, params: PyTree) -> optax.OptState:
        """Optimizer state for `params`, laid out like them."""
        return self.config.build(self.num_train_steps).init(params)

    def update[Params: PyTree](
        self, grads: Params, opt_state: optax.OptState, params: Params, **extra: Any
    ) -> tuple[Params, optax.OptState]:
        """Turns gradients into updates, to be added to `params`, and the next optimizer state.

        Args:
            grads: of the loss.
            opt_state: of the step before.
            params: that are to be updated.
            **extra: `value` and `key`, for a transformation that takes extra arguments.
        """
        transform = optax.with_extra_args_support(self.config.build(self.num_train_steps))
        updates, opt_state = transform.update(grads, opt_state, params, **extra)
        return updates, opt_state

    def learning_rate(self, step: Int[Array, ""] | int) -> Scalar:
        """Learning rate of the update from `step` to `step + 1`."""
        return jnp.asarray(self.config.build_schedule(self.num_train_steps)(step), jnp.float32)

    def routing(self, params: PyTree) -> tuple[ParamGroup, ...]:
        """Which parameter is updated how, as the config's `groups` says.

        Args:
            params: the model; shapes suffice (`eqx.filter_eval_shape`).

        Raises:
            ValueError: if the optimizer refuses the parameters.
        """
        leaves, groups = jax.tree.leaves_with_path(params), jax.tree.leaves(self.config.groups(params))
        return tuple(
            ParamGroup(jax.tree_util.keystr(path), leaf.shape, group)
            for (path, leaf), group in zip(leaves, groups, strict=True)
        )


def _clip(config: _Own) -> optax.GradientTransformation:
    norm = config.max_grad_norm
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def _scaled(
    config: _Own, scale: optax.GradientTransformation, rate: optax.Schedule
) -> tuple[optax.GradientTransformation, ...]:
    return scale, _decay_and_rates(config), optax.scale_by_learning_rate(rate)


def _number(config: _Own, kind: ParameterKind, name: str) -> Any:
    """A number of a kind of parameters: its own, or the optimizer's."""
    own = getattr(getattr(config, kind, GroupConfig()), name)
    return getattr(config, name) if own is None else own


def _default_peak(config: _Own, kind: ParameterKind) -> float:
    adam = getattr(config, "adam_learning_rate", None)
    return config.learning_rate if kind == "matrix" or adam is None else adam


def _peak(config: _Own, kind: ParameterKind) -> float:
    own = getattr(config, kind, GroupConfig()).learning_rate
    return _default_peak(config, kind) if own is None else own


def _describe(name: str, config: _Own, kind: ParameterKind) -> str:
    decay = _number(config, kind, "weight_decay")
    return f"{name}, rate {_peak(config, kind):g}" + (f", decay {decay:g}" if decay else "")


def _adam(config: AdamWConfig | MuonConfig) -> optax.GradientTransformation:
    return _by_betas(config, lambda beta1, beta2: optax.scale_by_adam(beta1, beta2, config.epsilon))


def _by_betas(
    config: _Own, scale: Callable[[float, float], optax.GradientTransformation]
) -> optax.GradientTransformation:
    """One transformation where all kinds have the same betas, else one for each pair of them."""

    def betas(kind: ParameterKind) -> tuple[float, float]:
        return _number(config, kind, "beta1"), _number(config, kind, "beta2")

    pairs = {betas(kind) for kind in ("embedding", "head", "matrix", "norm")}
    if len(pairs) == 1:
        return scale(*pairs.pop())
    return optax.partition(
        {f"{one} {two}": scale(one, two) for one, two in sorted(pairs)},
        lambda params: jax.tree.map(lambda kind: "{} {}".format(*betas(kind)), parameter_kinds(params)),
    )


def _decay_and_rates(config: _Own) -> optax.GradientTransformation:
    """Adds what decays to each update, and scales it by its kind's share of the learning rate that follows."""

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        def one(kind: ParameterKind, update: Array, param: Array) -> Array:
            decay, share = _number(config, kind, "weight_decay"), _peak(config, kind) / _default_peak(config, kind)
            decayed = update + decay * param if decay else update
            return decayed if share == 1 else share * decayed

        return jax.tree.map(one, parameter_kinds(updates), updates, params)

    return optax.stateless(update)


def _muon_or_adamw(params: PyTree) -> PyTree:
    return jax.tree.map(lambda kind: "muon" if kind == "matrix" else "adamw", parameter_kinds(params))
