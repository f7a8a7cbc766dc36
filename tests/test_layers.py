import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from grug_native.kernels.backend import Backend
from grug_native.kernels.choices import noted_choices
from grug_native.layers import LayerState, PerLayer, RematName, resolve_remat, resolve_scan, through_layers, to_logits
from grug_native.metrics import parameter_counts
from grug_native.model import MODEL_PRESETS, activation_bytes
from tests.accelerators import CPU, HOPPER, TPU
from tests.tolerance import assert_close, assert_trees_close

GIB = 2**30


@pytest.mark.parametrize(
    ("backend", "layers", "scanned"),
    [(CPU, 48, False), (CPU, 49, True), (HOPPER, 24, False), (HOPPER, 64, True), (TPU, 8, False), (TPU, 24, True)],
)
def test_many_layers_are_scanned(backend: Backend, layers: int, scanned: bool) -> None:
    with noted_choices() as notes:
        assert resolve_scan("auto", layers, backend) is scanned
        assert resolve_scan(not scanned, layers, backend) is not scanned
    assert notes["layers"].name == ("scanned" if scanned else "unrolled")


@pytest.mark.parametrize(
    ("size", "tokens", "shards", "memory", "remat"),
    [
        ("1_2b", 8 * 2048, 1, None, "none"),
        ("1_2b", 8 * 2048, 1, 139 * GIB, "none"),
        ("1_2b", 16 * 2048, 1, 80 * GIB, "dots"),
        ("1_2b", 64 * 2048, 1, 80 * GIB, "full"),
        ("1_2b", 8 * 2048, 1, 80 * GIB, "none"),
        ("1_2b", 16 * 2048, 8, 80 * GIB, "dots"),
        ("1_2b", 12 * 2048, 8, 80 * GIB, "none"),
        ("1_2b", 2048, 1, 16 * GIB, "full"),
    ],
)
def test_no_more_is_recomputed_than_memory_asks_for(
    size: str, tokens: int, shards: int, memory: int | None, remat: str
) -> None:
    config = MODEL_PRESETS[size]

    def choose(asked: RematName) -> str:
        return resolve_remat(
            asked,
            tokens=tokens,
            shards=shards,
            parameters=parameter_counts(config)["total"],
            activations=activation_bytes(config),
            backend=HOPPER._replace(memory=memory),
        )

    assert choose("auto") == remat
    with noted_choices() as notes:
        assert choose("dots") == "dots"
    assert notes["recomputed"].reason == "asked for by the config"


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_layers_are_applied_in_order_and_their_outputs_stacked(scan: bool, remat: RematName) -> None:
    weights = {"scale": jnp.array([2.0, 3.0]), "shift": jnp.array([[1.0], [5.0]])}

    def apply(x: Array, layer: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        x = layer["scale"] * x + layer["shift"]
        return x, {"mean": x.mean()}

    x, outputs = through_layers(apply, jnp.ones((1, 1, 1)), weights, scan=scan, remat=remat)
    assert x.item() == 3 * (2 + 1) + 5
    assert outputs["mean"].tolist() == [3, 14]


class Seen(LayerState):
    total: Array


@pytest.mark.parametrize("scan", [True, False])
def test_states_go_from_call_to_call_and_are_stacked_by_a_scan_only(scan: bool) -> None:
    def apply(x: Array, layer: tuple[Array, Seen]) -> tuple[Array, tuple[Seen, Array]]:
        weight, seen = layer
        return weight * x, (Seen(seen.total + x.sum()), weight)

    weights, states = jnp.array([2.0, 3.0]), Seen(jnp.zeros(2))
    for _ in range(2):
        x, (states, stacked) = through_layers(apply, jnp.ones((1, 1, 1)), (weights, states), scan=scan, remat="none")
        assert x.item() == 6
        assert stacked.tolist() == [2, 3]
    assert isinstance(states, Seen if scan else PerLayer)
    assert jnp.array(jax.tree.leaves(states)).ravel().tolist() == [2, 4]


def test_logits_in_f32_have_the_gradient_of_a_plain_product() -> None:
    x, head = (jax.random.normal(jax.random.key(n), (4, 8), jnp.bfloat16) for n in range(2))
    cotangent = jax.random.normal(jax.random.key(2), (4, 4))
    ours, pull = jax.vjp(to_logits, x, head.T)
    exact, exact_pull = jax.vjp(lambda x, head: x @ head, x.astype(jnp.float32), head.T.astype(jnp.float32))
    assert ours.dtype == jnp.float32
    assert_close(ours, exact, terms=8)
    assert_trees_close(pull(cotangent), exact_pull(cotangent), terms=4, dtype="bfloat16")
