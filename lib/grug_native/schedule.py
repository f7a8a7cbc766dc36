"""Learning-rate schedules as plain data."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import optax

ScheduleShape = Literal["cosine", "linear", "constant", "wsd"]
"""Shape of the learning rate after the warm-up; `wsd` is constant, then linear over the last `decay` steps."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How a learning rate goes over a run."""

    shape: ScheduleShape = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: int | float = 0.01
    """Steps of linear warm-up: a count, or below 1 a fraction of the run."""
    decay: int | float = 0.2
    """Steps of the final decay of `wsd`: a count, or below 1 a fraction of the run."""
    min_lr_ratio: float = 0.1
    """The learning rate ends at this fraction of the peak."""

    def __post_init__(self) -> None:
        if self.shape not in get_args(ScheduleShape):
            known = ", ".join(get_args(ScheduleShape))
            raise ValueError(f"optimizer.schedule.shape={self.shape!r} is unknown: choose one of {known}")
        for name in ("warmup", "decay", "min_lr_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.schedule.{name}={getattr(self, name)} must not be negative")

    def build(self, num_train_steps: int, *, peak: float) -> optax.Schedule:
        """Learning rate as a function of the updates done so far.

        The first update already has a positive rate, and the last one the final rate.

        Raises:
            ValueError: if warm-up and decay do not fit in the run.
        """
        warmup = _steps(self.warmup, num_train_steps)
        rest = max(num_train_steps - warmup, 0)
        decay = {"constant": 0, "wsd": _steps(self.decay, num_train_steps)}.get(self.shape, rest)
        if warmup + decay > num_train_steps:
            raise ValueError(
                f"optimizer.schedule.warmup={self.warmup} and optimizer.schedule.decay={self.decay} take {warmup} + "
                f"{decay} steps, more than trainer.num_train_steps={num_train_steps}"
            )
        final, span = peak * self.min_lr_ratio, max(decay - 1, 1)
        if self.shape == "cosine":
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


def _steps(count_or_fraction: int | float, total: int) -> int:
    return int(count_or_fraction * total) if 0 < count_or_fraction < 1 else int(count_or_fraction)
