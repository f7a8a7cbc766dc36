from grug_native.types import AttentionMask, LmBatch
from tests.fixtures_run import make_batch


def test_levanters_example_has_the_shape_that_the_core_expects() -> None:
    batch = make_batch(packed=True)
    assert isinstance(batch, LmBatch)
    assert isinstance(batch.attn_mask, AttentionMask)
