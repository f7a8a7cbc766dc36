import pytest

from grug_native.optimizer import MuonConfig
from grug_native.recommended import recommended_in_words, recommended_optimizer


def rates(chosen: MuonConfig) -> dict[str, float | None]:
    groups = {kind: getattr(chosen, kind) for kind in ("head", "embedding", "norm")}
    return {"matrix": chosen.learning_rate} | {kind: group.learning_rate for kind, group in groups.items()}


@pytest.mark.parametrize(
    ("width", "matrix", "head"),
    [(64, 0.0343, 0.0548), (128, 0.0197, 0.0315), (384, 0.00818, 0.0131), (2048, 0.00214, 0.00343)],
)
def test_rates_by_width(width: int, matrix: float, head: float) -> None:
    chosen = recommended_optimizer(width)
    assert rates(chosen) == {"matrix": matrix, "head": head, "embedding": 0.11, "norm": 0.002}
    assert [getattr(chosen, kind).weight_decay for kind in ("head", "embedding", "norm")] == [0, 0, 0]


def test_the_words_have_the_numbers() -> None:
    assert recommended_in_words(128).startswith("muon, rates: matrix 0.0197, head 0.0315, embedding 0.11, norm 0.002; ")
    assert "warm-up 20%, down to 0 (for width 128, " in recommended_in_words(128)
