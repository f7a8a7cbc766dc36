from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grug_native.schedule import ScheduleConfig
from tests.fixtures_run import without_runtime_types
from tests.tolerance import assert_close

SCHEDULES: list[tuple[dict[str, Any], list[float]]] = [
    ({"shape": "constant", "warmup": 2}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ({"shape": "linear", "warmup": 0.2}, [0.5, 1, 1, 6.1 / 7, 5.2 / 7, 4.3 / 7, 3.4 / 7, 2.5 / 7, 1.6 / 7, 0.1]),
    ({"shape": "wsd", "warmup": 2, "decay": 4}, [0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
    ({"shape": "wsd", "warmup": 0, "decay": 0.4}, [1, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
    (
        {"shape": "cosine", "warmup": 2},
        [0.5, 1, *(0.1 + 0.45 * (1 + np.cos(np.pi * i / 7)) for i in range(8))],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), SCHEDULES)
def test_schedules(fields: dict[str, Any], expected: list[float]) -> None:
    schedule = ScheduleConfig(**fields).build(10, peak=2.0)
    assert_close([float(schedule(step)) / 2 for step in range(10)], expected, terms=4)


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 \+ 4 steps, more than trainer.num_train_steps=10"):
        ScheduleConfig(shape="wsd", warmup=8, decay=4).build(10, peak=1.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shape": "cosin"}, ["schedule.shape='cosin'", "cosine, linear"]),
        ({"warmup": -1}, ["schedule.warmup=-1"]),
        ({"min_lr_ratio": float("nan")}, ["schedule.min_lr_ratio=nan"]),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields: dict[str, Any], words: list[str]) -> None:
    with without_runtime_types(), pytest.raises(ValueError) as error:
        ScheduleConfig(**fields)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_wsd_ends_exactly_where_it_should(ratio: float) -> None:
    for steps in (10, 97, 1000):
        config = ScheduleConfig(shape="wsd", warmup=0, min_lr_ratio=ratio)
        schedule = jax.jit(config.build(steps, peak=3e-3))
        rates = [float(schedule(jnp.asarray(step))) for step in (steps - 2, steps - 1, steps)]
        assert rates[1] == rates[2] == np.float32(3e-3 * ratio)
        assert rates[0] > rates[1]
