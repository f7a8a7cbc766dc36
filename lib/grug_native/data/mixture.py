"""The weights of a mixture: what they say, and whether they can be kept."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

type Weights = Mapping[str, float] | Sequence[tuple[int, Mapping[str, float]]]
"""Weights of the components; or stages, pairs of (first step, weights)."""


def mixture_stages(weights: Weights | None) -> list[tuple[int, Mapping[str, float]]]:
    """Pairs of (first step, weights); none where there are no components."""
    return [(0, weights)] if isinstance(weights, Mapping) else list(weights or ())


def check_names(weights: Weights | None, components: Collection[str], field: str = "data.train_weights") -> None:
    """Refuses weights of what is no component.

    Raises:
        ValueError: names them, and the components.
    """
    for _, shares in mixture_stages(weights):
        if unknown := sorted(set(shares) - set(components)):
            raise ValueError(f"{field} names {unknown}, which are none of the components {sorted(components)}")


def check_mixture(weights: Weights | None, block: int, data_offset: Callable[[int], int]) -> None:
    """Refuses what levanter would answer with an assertion, or by leaving a component out with a warning.

    Args:
        weights: of the components.
        block: sequences within which the shares are exact (`data.mixture_block_size`).
        data_offset: consumed by the steps before a step.

    Raises:
        ValueError: if the stages are out of order or start inside a block, or a share is less than one sequence of it.
    """
    stages = mixture_stages(weights)
    if not stages:
        raise ValueError("data.components is empty: name at least one dataset")
    if not 0 < block < 2**16:
        raise ValueError(f"data.mixture_block_size={block} must lie in [1, {2**16 - 1}] sequences")
    steps = [step for step, _ in stages]
    if steps[0] != 0 or sorted(set(steps)) != steps:
        raise ValueError(f"the stages of data.train_weights must start at step 0 and increase; they start at {steps}")
    for step, shares in stages:
        sequences = data_offset(step)
        if sequences % block != 0:
            size = data_offset(step + 1) - sequences
            raise ValueError(
                f"the stage of data.train_weights that starts at step {step} starts at sequence {sequences} (batches "
                f"of {size}), inside a mixture block of {block}: set data.mixture_block_size="
                f"{math.gcd(sequences, block)}, or start the stage at a step whose first sequence is a multiple of "
                f"{block}"
            )
        total = sum(shares.values())
        if total <= 0 or min(shares.values()) < 0:
            raise ValueError(
                f"data.train_weights at step {step} must be positive or zero, not all zero: {dict(shares)}"
            )
        for name, weight in shares.items():
            if 0 < weight / total * block < 1:
                raise ValueError(
                    f"data.train_weights at step {step} gives {name!r} a share of {weight / total:.3g}, less than one "
                    f"sequence of a mixture block of {block}, so it would never be seen: "
                    f"set data.mixture_block_size to at least {math.ceil(total / weight)}"
                )
