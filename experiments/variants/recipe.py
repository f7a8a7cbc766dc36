"""The optimizers that were tried against each other: how matrices are updated, and how they are kept from growing.

Embedding, head and norms are left to AdamW, each with a rate of its own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from experiments.variants.own_optimizer import scale_by_normuon
from grug_native.language_model import parameter_kinds
from grug_native.muon import scale_by_muon
from grug_native.optimizer import AdamWConfig
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import reshard

MatrixUpdate = Literal["adam", "muon", "polar", "normuon", "soap"]
"""How the matrices of the blocks are updated."""
Decay = Literal["plain", "cautious", "sphere"]
"""How they are kept from growing."""

POLAR_EXPRESS = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
)
"""Quintics of Amsel et al. 2025 (arXiv 2505.16932), one an iteration, with their safety factor of 1.01 in them."""

_COSINE = ScheduleConfig()
_UNCLIPPED = AdamWConfig(max_grad_norm=None)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """One of fifteen ways to update the matrices of the blocks, and AdamW for everything else."""

    update: MatrixUpdate = "adam"
    decay: Decay = "plain"
    learning_rate: float = 3e-3
    """Peak learning rate of the matrices; with `sphere` the length of a step over that of the matrix."""
    schedule: ScheduleConfig = _COSINE
    """How their rate goes over the run."""
    weight_decay: float = 0.1
    """Decay of the matrices per unit of learning rate; `sphere` has none."""
    momentum: float = 0.95
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment, where there is one."""
    max_grad_norm: float | None = 1.0
    """Gradients of all parameters are scaled down to this global L2 norm; None clips nothing."""
    rest: AdamWConfig = _UNCLIPPED
    """What is done to embedding, head and norms."""

    def build_schedule(self, num_train_steps: int) -> optax.Schedule:
        """The learning rate of the matrices."""
        return self.schedule.build(num_train_steps, peak=self.learning_rate)

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Clipping, then the matrices' update and decay, or AdamW."""
        rate = self.build_schedule(num_train_steps)
        if self.decay == "plain":
            end = optax.chain(optax.add_decayed_weights(self.weight_decay), optax.scale_by_learning_rate(rate))
        elif self.decay == "cautious":
            end = optax.chain(add_cautious_decay(self.weight_decay), optax.scale_by_learning_rate(rate))
        else:
            end = stay_on_sphere(rate)
        clip = optax.identity() if self.max_grad_norm is None else optax.clip_by_global_norm(self.max_grad_norm)
        parts = {"matrix": optax.chain(self._scale(), end), "rest": self.rest.build(num_train_steps)}
        return optax.chain(clip, optax.partition(parts, _matrix_or_rest))

    def groups(self, params: PyTree) -> PyTree:
        """By kind."""
        own = f"{self.update}, {self.decay} decay {self.weight_decay:g}, rate {self.learning_rate:g}"
        return jax.tree.map(
            lambda part, rest: own if part == "matrix" else rest, _matrix_or_rest(params), self.rest.groups(params)
        )

    def _scale(self) -> optax.GradientTransformation:
        match self.update:
            case "adam":
                return optax.scale_by_adam(self.momentum, self.beta2)
            case "muon":
                return scale_by_muon(self.momentum, 5)
            case "polar":
                return scale_by_muon(self.momentum, 5, POLAR_EXPRESS)
            case "normuon":
                return scale_by_normuon(self.momentum, self.beta2, 1e-8, 5)
            case "soap":
                return scale_by_soap(self.momentum, self.beta2)
            case _:
                assert_never(self.update)


def _matrix_or_rest(params: PyTree) -> PyTree:
    return jax.tree.map(lambda kind: "matrix" if kind == "matrix" else "rest", parameter_kinds(params))


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`."""

    steps: Array
    """Updates so far."""
    mean: optax.Updates
    """Of the gradients, in the parameters' own axes."""
    square: optax.Updates
    """Mean squares of the gradients, along the eigenvectors."""
    grams: tuple[optax.Updates, optax.Updates]
    """Means of G G' (*stack, M, M) and of G' G (*stack, N, N)."""
    bases: tuple[optax.Updates, optax.Updates]
    """Their eigenvectors, approximately, as columns."""


def scale_by_soap(
    beta1: float, beta2: float, *, epsilon: float = 1e-8, every: int = 10
) -> optax.GradientTransformation:
    """Adam along the eigenvectors of Shampoo's two matrices, which follow by one step of power iteration and QR.

    Each device has the whole of the state, and does all of the work.

    Args:
        beta1: decay of the mean gradient.
        beta2: decay of the mean squares, and of Shampoo's matrices.
        epsilon: added to the roots of the mean squares.
        every: steps from one update of the eigenvectors to the next; the first step gives no update but makes them.

    References:
        Vyas et al. 2024 (arXiv 2409.11321), algorithm 3.
    """

    def init(params: optax.Params) -> ScaleBySoapState:
        def gram(param: Array, axis: int) -> Array:
            size = param.shape[axis]
            return jnp.zeros((*param.shape[:-2], size, size), param.dtype)

        zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, param.dtype), params)
        sides = tuple(jax.tree.map(partial(gram, axis=axis), params) for axis in (-2, -1))
        eyes = jax.tree.map(lambda side: side + jnp.eye(side.shape[-1], dtype=side.dtype), sides)
        return ScaleBySoapState(jnp.zeros((), jnp.int32), zeros, zeros, (sides[0], sides[1]), (eyes[0], eyes[1]))

    def update(
        updates: optax.Updates, state: ScaleBySoapState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        del params
        count = state.steps + 1
        first, due = count == 1, (count - 1) % every == 0
        leaves, tree = jax.tree.flatten(updates)
        homes = [jax.typeof(leaf).sharding.spec for leaf in leaves]
        gs = [reshard(leaf, *(None,) * leaf.ndim) for leaf in leaves]
        lefts, rights, old_left, old_right, means, squares = (
            jax.tree.leaves(x) for x in (*state.grams, *state.bases, state.mean, state.square)
        )
        new_left = [beta2 * old + (1 - beta2) * g @ g.mT for old, g in zip(lefts, gs, strict=True)]
        new_right = [beta2 * old + (1 - beta2) * g.mT @ g for old, g in zip(rights, gs, strict=True)]
        mean = [beta1 * old + (1 - beta1) * g for old, g in zip(means, gs, strict=True)]

        def turned(x: Array, left: Array, right: Array) -> Array:
            return left.mT @ x @ right

        square = [
            jnp.where(first, old, beta2 * old + (1 - beta2) * jnp.square(turned(g, left, right)))
            for old, g, left, right in zip(squares, gs, old_left, old_right, strict=True)
        ]
        seen = jnp.maximum(count - 1, 1)  # The first gradient only makes the eigenvectors.
        one, two = 1 - beta1**count, 1 - beta2**seen

        def direction(m: Array, s: Array, left: Array, right: Array) -> Array:
            along = turned(m / one, left, right) / (jnp.sqrt(s / two) + epsilon)
            return jnp.where(first, 0.0, left @ along @ right.mT)

        directions = [direction(*of) for of in zip(mean, square, old_left, old_right, strict=True)]

        def follow(gram: Array, basis: Array) -> Array:
            begun = jax.lax.cond(first, lambda: jnp.linalg.eigh(gram)[1], lambda: jnp.linalg.qr(gram @ basis)[0])
            return begun.astype(basis.dtype)

        bases = jax.lax.cond(
            due,
            lambda: (list(map(follow, new_left, old_left)), list(map(follow, new_right, old_right))),
            lambda: (old_left, old_right),
        )
        back = partial(jax.tree.unflatten, tree)
        directions = [reshard(d, *home) for d, home in zip(directions, homes, strict=True)]
        return back(directions), ScaleBySoapState(
            count, back(mean), back(square), (back(new_left), back(new_right)), (back(bases[0]), back(bases[1]))
        )

    return optax.GradientTransformation(init, update)


def add_cautious_decay(weight_decay: float) -> optax.GradientTransformation:
    """Weight decay only where the update already moves a weight towards zero.

    References:
        Chen et al. 2025 (arXiv 2510.12402).
    """

    def decayed(update: Array, param: Array) -> Array:
        return update + weight_decay * jnp.where(update * param > 0, param, 0.0)

    return optax.stateless(lambda updates, params: jax.tree.map(decayed, updates, params))


def stay_on_sphere(rate: optax.Schedule) -> optax.GradientTransformation:
    """Steps of a length relative to the matrix's own, after which each matrix gets its norm back.

    References:
        Wen et al. 2025, Fantastic Pretraining Optimizers II (whenwen.github.io/wd_blog); MuonH and AdamH of levanter.
    """

    def step(relative: Array, update: Array, param: Array) -> Array:
        norm = _norm(param)
        moved = param - relative * norm * update / jnp.maximum(_norm(update), 1e-10)
        return moved * norm / jnp.maximum(_norm(moved), 1e-10) - param

    def update(
        updates: optax.Updates, state: optax.ScaleByScheduleState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        steps = jax.tree.map(partial(step, jnp.asarray(rate(state.count))), updates, params)
        return steps, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda _: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def _norm(matrices: Float[Array, "*stack M N"]) -> Float[Array, "*stack 1 1"]:
    return jnp.sqrt(jnp.sum(jnp.square(matrices), axis=(-2, -1), keepdims=True))
