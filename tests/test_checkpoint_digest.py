import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from grug_native.checkpoint.digest import host_digest, is_trouble, item_of
from grug_native.checkpoint.leaves import finish_digests, start_digests

DTYPES = [np.float32, np.int32, np.uint32, ml_dtypes.bfloat16, np.float16, np.int8, np.uint8, np.bool_]


def make_array(seed: int, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    values = np.asarray(np.random.default_rng(seed).standard_normal(shape) * 50)
    return np.asarray(values > 0 if dtype == np.bool_ else values.astype(np.int32).astype(dtype))


def device_digest(array: jax.Array) -> str:
    return finish_digests(start_digests({"x": array}))[0]["x"]


@settings(max_examples=200)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float32, ml_dtypes.bfloat16, np.int8]),
    st.integers(1, 5000),
    st.data(),
)
def test_any_change_of_one_element_changes_the_digest(seed: int, dtype: type, size: int, data: st.DataObject) -> None:
    array = make_array(seed, (size,), dtype)
    before = host_digest(array)
    raw = array.view(np.uint8)
    raw[data.draw(st.integers(0, raw.size - 1))] ^= data.draw(st.integers(1, 255))
    assert host_digest(array) != before


@given(st.integers(0, 2**32 - 1), st.integers(2, 3000))
def test_the_order_of_elements_matters(seed: int, size: int) -> None:
    array = make_array(seed, (size,), np.float32)
    moved = np.roll(array, 1)
    assert np.array_equal(array, moved) or host_digest(array) != host_digest(moved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 300, 129)])
def test_the_device_and_the_host_agree(dtype: type, shape: tuple[int, ...]) -> None:
    array = make_array(0, shape, dtype)
    assert device_digest(jnp.asarray(array)) == host_digest(array)


def test_the_layout_over_devices_does_not_matter() -> None:
    count = jax.device_count()
    array = make_array(1, (4 * count, 6, 2 * count), np.float32)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(kind,))
        for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, None, "data")):
            assert device_digest(jax.device_put(array, NamedSharding(mesh, spec))) == host_digest(array)


def test_the_digest_s_value_is_part_of_the_format() -> None:
    """If this fails, raise FORMAT_VERSION: older checkpoints no longer verify."""
    assert host_digest(np.arange(1000, dtype=np.float32)) == "7f0ea0c4e00bf2d4"


def test_negative_zero_and_nan_bits_count() -> None:
    zeros = np.zeros(4, np.float32)
    assert host_digest(zeros) != host_digest(-zeros)
    nans = np.full(4, 0x7FC00000, np.uint32), np.full(4, 0x7FC00001, np.uint32)
    assert host_digest(nans[0].view(np.float32)) != host_digest(nans[1].view(np.float32))


def test_non_finite_leaves_are_named() -> None:
    arrays = {"good": jnp.ones(3), "ints": jnp.arange(3), "bad": jnp.array([1.0, jnp.inf]), "worse": jnp.array(jnp.nan)}
    assert finish_digests(start_digests(arrays))[1] == ["bad", "worse"]


def test_items() -> None:
    assert item_of("params.blocks.w") == ("params", "blocks.w")
    assert item_of("ema_params.embed") == ("ema_params", "embed")
    assert item_of("opt_state.0.mu.embed") == ("train", "opt_state.0.mu.embed")
    assert item_of("step") == ("train", "step")


@pytest.mark.parametrize(
    ("words", "trouble"),
    [
        ("ABORTED: All 6 retry attempts failed: Service Unavailable [http_response_code='503']", True),
        ("UNAUTHENTICATED: no token", True),
        ("PERMISSION_DENIED: Forbidden [http_response_code='403']", True),
        ("Error reading x/c/0/0: ExpiredToken [http_response_code='400']", True),
        ("UNAVAILABLE: CURL error Could not connect to server [curl_code='7']", True),
        ("NOT_FOUND: chunk {1, 0} stored at gs://b/ABORTED: /UNAVAILABLE/c/1/0 is missing", False),
        ("NOT_FOUND: Not Found [http_response_code='404']", False),
        ("FAILED_PRECONDITION: Error reading x/c/0/0: Not enough data", False),
        ('DATA_LOSS: Error opening "zarr3" driver: Invalid JSON', False),
    ],
)
def test_what_tensorstore_says_is_trouble_or_damage(words: str, trouble: bool) -> None:
    assert is_trouble(ValueError(words)) == trouble


def test_want_of_memory_or_of_an_answer_is_trouble() -> None:
    assert is_trouble(MemoryError()) and is_trouble(TimeoutError())
