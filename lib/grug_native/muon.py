"""Muon: orthogonalised momentum for matrices, and how stacked matrices are dealt out over a mesh."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float

from grug_native.sharding import explicit_mesh, reshard

type Quintic = tuple[float, float, float]
"""a, b and c of `a x + b x^3 + c x^5`."""

NEWTON_SCHULZ_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),)
"""Quintic of Jordan et al. 2024 (kellerjordan.github.io/posts/muon), tuned for the steepest slope at zero."""


def orthogonalize(
    matrices: Float[Array, "*batch M N"], *, steps: int, coefficients: Sequence[Quintic] = NEWTON_SCHULZ_COEFFICIENTS
) -> Float[Array, "*batch M N"]:
    """Moves each matrix towards the nearest semi-orthogonal one, by Newton-Schulz iterations.

    Its singular values end near 1 (between 0.7 and 1.2 after five steps), its singular vectors stay.

    Args:
        matrices: of any shape.
        steps: iterations.
        coefficients: of the iterations, in turn.

    References:
        Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Higham, Functions of Matrices, section 8.3.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = jnp.swapaxes(matrices, -1, -2) if tall else matrices
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for a, b, c in islice(cycle(coefficients), steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def per_matrix(
    function: Callable[[Float[Array, "*batch M N"]], Float[Array, "*batch M N"]],
) -> Callable[[Float[Array, "*batch M N"]], Float[Array, "*batch M N"]]:
    """A function of whole matrices, for stacks of them that are split over a mesh.

    Under explicit axes the first axis of a stack (the layers) is dealt out over `data`, each matrix whole, and with
    them as many empty ones as make the number divide; further axes of the stack (experts) stay split as they are. So
    the result is the same on one device and on any mesh, and the work is shared out.
    """

    def dealt(matrices: Float[Array, "*batch M N"]) -> Float[Array, "*batch M N"]:
        if not explicit_mesh():
            return function(matrices)
        home = jax.typeof(matrices).sharding.spec
        if matrices.ndim == 2:
            return reshard(function(reshard(matrices, None, None)), *home)
        stacked = home[1:-2]
        padding = -matrices.shape[0] % get_abstract_mesh().shape["data"]
        padded = jnp.pad(matrices, ((0, padding), *((0, 0) for _ in matrices.shape[1:])))
        whole = function(reshard(padded, "data", *stacked, None, None))
        return reshard(whole, None, *home[1:])[: matrices.shape[0]]

    return dealt


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`: the momentum, shaped like the parameters."""

    momentum: optax.Updates
    """A decayed sum of the gradients."""


def scale_by_muon(
    momentum: float, steps: int, coefficients: Sequence[Quintic] = NEWTON_SCHULZ_COEFFICIENTS
) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum for stacked matrices, scaled to the size of an AdamW update.

    References:
        Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the factor 0.2 sqrt(max(M, N)), with which AdamW's
        learning rate and weight decay serve, is from Liu et al. 2025 (arXiv 2502.16982, section 2.2).
    """
    orthogonal = per_matrix(partial(orthogonalize, steps=steps, coefficients=coefficients))

    def init(params: optax.Params) -> ScaleByMuonState:
        return ScaleByMuonState(jax.tree.map(jnp.zeros_like, params))

    def direction(update: Float[Array, "*batch M N"]) -> Float[Array, "*batch M N"]:
        return 0.2 * max(update.shape[-2:]) ** 0.5 * orthogonal(update)

    def update(
        updates: optax.Updates, state: ScaleByMuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        del params
        mean = optax.tree.update_moment(updates, state.momentum, momentum, 1)
        nesterov = optax.tree.update_moment(updates, mean, momentum, 1)
        return jax.tree.map(direction, nesterov), ScaleByMuonState(mean)

    return optax.GradientTransformation(init, update)
