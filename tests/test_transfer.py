"""The study of rates by width: what it finds where the answer is known."""

import math
from collections.abc import Mapping

import pytest

from experiments.benchmarks.transfer import KINDS, START, fitted, muon, recommended, tune
from grug_native.recommended import recommended_optimizer

OPTIMUM = {"matrix": 0.3, "head": 0.021, "embedding": 0.05}


def valley(rates: Mapping[str, float]) -> float:
    return 2 + sum(math.log(rates[kind] / OPTIMUM[kind]) ** 2 for kind in KINDS)


def test_each_rate_is_found_however_far_it_is() -> None:
    found, lowest = tune(valley, START)
    assert found == pytest.approx(OPTIMUM)
    assert lowest <= 2 + 3 * math.log(2**0.5) ** 2
    assert tune(valley, START, ("head",))[0] == pytest.approx({"head": OPTIMUM["head"]})


def test_a_power_law_goes_on() -> None:
    tuned = {width: {"matrix": 2 / width, "head": 0.1, "embedding": width**0.5} for width in (64, 128, 256)}
    assert fitted(tuned, 1024) == pytest.approx({"matrix": 2 / 1024, "head": 0.1, "embedding": 32})


def test_the_studys_optimizer_is_the_recommended_one() -> None:
    assert muon(recommended(128)) == recommended_optimizer(128)
