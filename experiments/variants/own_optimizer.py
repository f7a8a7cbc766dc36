"""NorMuon: Muon whose neurons take steps of like size, for the matrices, and AdamW for the rest."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from grug_native.language_model import parameter_kinds
from grug_native.muon import orthogonalize, per_matrix
from grug_native.optimizer import AdamWConfig
from grug_native.schedule import ScheduleConfig

_COSINE = ScheduleConfig()
_UNCLIPPED = AdamWConfig(max_grad_norm=None)


@dataclass(frozen=True, kw_only=True)
class NorMuonConfig:
    """NorMuon for the matrices of the blocks, and AdamW for everything else; see `scale_by_normuon`."""

    learning_rate: float = 3e-3
    """Peak learning rate of the matrices."""
    schedule: ScheduleConfig = _COSINE
    """How their rate goes over the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices per unit of learning rate."""
    momentum: float = 0.95
    """Decay of the momentum."""
    beta2: float = 0.95
    """Decay of the neurons' mean squares."""
    epsilon: float = 1e-8
    """Added to the roots of the mean squares."""
    newton_schulz_steps: int = 5
    """Iterations of the orthogonalisation."""
    max_grad_norm: float | None = 1.0
    """Gradients of all parameters are scaled down to this global L2 norm; None clips nothing."""
    rest: AdamWConfig = _UNCLIPPED
    """What is done to embedding, head and norms."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "newton_schulz_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be positive")
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")

    def build_schedule(self, num_train_steps: int) -> optax.Schedule:
        """The learning rate of the matrices."""
        return self.schedule.build(num_train_steps, peak=self.learning_rate)

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Clipping, then NorMuon or AdamW."""
        normuon = optax.chain(
            scale_by_normuon(self.momentum, self.beta2, self.epsilon, self.newton_schulz_steps),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self.build_schedule(num_train_steps)),
        )
        clip = optax.identity() if self.max_grad_norm is None else optax.clip_by_global_norm(self.max_grad_norm)
        parts = {"normuon": normuon, "rest": self.rest.build(num_train_steps)}
        return optax.chain(clip, optax.partition(parts, _normuon_or_rest))

    def groups(self, params: PyTree) -> PyTree:
        """By kind."""
        own = f"normuon, rate {self.learning_rate:g}, decay {self.weight_decay:g}"
        return jax.tree.map(
            lambda part, rest: own if part == "normuon" else rest, _normuon_or_rest(params), self.rest.groups(params)
        )


def _normuon_or_rest(params: PyTree) -> PyTree:
    return jax.tree.map(lambda kind: "normuon" if kind == "matrix" else "rest", parameter_kinds(params))


class ScaleByNorMuonState(NamedTuple):
    """State of `scale_by_normuon`."""

    momentum: optax.Updates
    """A decayed sum of the gradients, shaped like the parameters."""
    mean_square: optax.Updates
    """Of each neuron's orthogonalised updates: a parameter (*stack, M, N) has (*stack, N) of them."""


def scale_by_normuon(momentum: float, beta2: float, epsilon: float, steps: int) -> optax.GradientTransformation:
    """Muon's update, each neuron's part of it divided by how large it has been, and scaled to the whole's former norm.

    A neuron is a column here, for weights are (inputs, outputs); of the authors' weights it is a row. The factor that
    makes the update as large as AdamW's is Muon's, 0.2 sqrt(max(M, N)).

    Args:
        momentum: decay of the momentum, which is Nesterov's as in `scale_by_muon`.
        beta2: decay of the mean squares.
        epsilon: added to their roots.
        steps: iterations of the orthogonalisation.

    References:
        Li et al. 2025 (arXiv 2510.05491).
    """
    orthogonal = per_matrix(lambda matrices: orthogonalize(matrices, steps=steps))

    def init(params: optax.Params) -> ScaleByNorMuonState:
        # A sum, for it is laid out over the mesh as those are that will follow.
        squares = jax.tree.map(lambda param: jnp.sum(jnp.zeros_like(param), axis=-2), params)
        return ScaleByNorMuonState(jax.tree.map(jnp.zeros_like, params), squares)

    def balance(update: Float[Array, "*stack M N"], square: Float[Array, "*stack N"]) -> Float[Array, "*stack M N"]:
        divided = update / (jnp.sqrt(square) + epsilon)[..., None, :]
        ratio = _norm(update) / (_norm(divided) + epsilon)
        return 0.2 * max(update.shape[-2:]) ** 0.5 * ratio * divided

    def update(
        updates: optax.Updates, state: ScaleByNorMuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByNorMuonState]:
        del params
        mean = optax.tree.update_moment(updates, state.momentum, momentum, 1)
        directions = jax.tree.map(orthogonal, optax.tree.update_moment(updates, mean, momentum, 1))
        squares = jax.tree.map(
            lambda direction, old: beta2 * old + (1 - beta2) * jnp.mean(jnp.square(direction), axis=-2),
            directions,
            state.mean_square,
        )
        return jax.tree.map(balance, directions, squares), ScaleByNorMuonState(mean, squares)

    return optax.GradientTransformation(init, update)


def _norm(matrices: Float[Array, "*stack M N"]) -> Float[Array, "*stack 1 1"]:
    return jnp.sqrt(jnp.sum(jnp.square(matrices), axis=(-2, -1), keepdims=True))
