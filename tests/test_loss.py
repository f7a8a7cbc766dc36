from collections.abc import Callable
from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from levanter.data.text.examples import GrugLmExample

from grug_native import loss as loss_module
from grug_native.kernels.backend import Backend
from grug_native.language_model import logits as logits_of
from grug_native.loss import (
    ComputeDtype,
    CrossEntropyName,
    next_token_loss,
    per_token_loss,
    resolve_block,
    resolve_cross_entropy,
)
from grug_native.model import Transformer
from grug_native.sharding import BATCH_AXES, MeshAxes, batch_sharding, create_mesh
from grug_native.types import Scalar
from tests.accelerators import CPU, HOPPER, TPU, pretend
from tests.fixtures_run import SMALL_MODEL, make_batch
from tests.tolerance import assert_close, assert_trees_close, gradient_terms, loss_terms, tolerance

LOSS_TERMS, GRADIENT_TERMS = loss_terms(SMALL_MODEL, 128, 32), gradient_terms(SMALL_MODEL, 128, 32)


type LossOf = Callable[..., Scalar]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return jax.tree.map(lambda w: 3 * w, Transformer.init(SMALL_MODEL, key=jax.random.key(0)))


@cache
def loss_of(name: CrossEntropyName) -> LossOf:
    """The loss alone, by an implementation."""
    return eqx.filter_jit(lambda model, batch, **given: next_token_loss(model, batch, cross_entropy=name, **given)[0])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that a batch of 128 tokens takes several blocks, and the last one is not full.
    monkeypatch.setattr(loss_module, "BLOCK_TOKENS", 50)


def by_hand(model: Transformer, batch: GrugLmExample, z_loss_weight: float) -> float:
    logits = np.asarray(eqx.filter_jit(logits_of)(model, batch.tokens, batch.attn_mask), np.float64)[:, :-1]
    log_z = np.log(np.exp(logits).sum(-1))
    labels = np.asarray(batch.tokens)[:, 1:]
    picked = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    weight = np.asarray(batch.loss_weight, np.float64)[:, :-1]
    return float((weight * (log_z - picked + z_loss_weight * log_z**2)).sum() / weight.sum())


@pytest.mark.parametrize("name", ["full", "blockwise"])
def test_loss_equals_the_formula(name: CrossEntropyName, model: Transformer) -> None:
    batch = make_batch(packed=True)
    weighted = GrugLmExample(
        batch.tokens, batch.loss_weight * jax.random.uniform(jax.random.key(5), (4, 32)), batch.attn_mask
    )
    for z_loss_weight in (0.0, 0.1):
        ours = loss_of(name)(model, weighted, z_loss_weight=z_loss_weight)
        assert_close(ours, by_hand(model, weighted, z_loss_weight), terms=LOSS_TERMS)


def test_both_implementations_have_the_same_gradient(model: Transformer) -> None:
    batch = make_batch(packed=True)

    @eqx.filter_jit
    def gradient(model: Transformer, name: CrossEntropyName) -> tuple[jax.Array, Transformer]:
        return jax.value_and_grad(lambda m: 7 * loss_of(name)(m, batch, z_loss_weight=0.1))(model)

    (full, full_grads), (blocks, block_grads) = gradient(model, "full"), gradient(model, "blockwise")
    assert_close(full, blocks, terms=LOSS_TERMS)
    assert_trees_close(full_grads, block_grads, terms=GRADIENT_TERMS)


@pytest.mark.parametrize(
    "axes",
    [MeshAxes(data=4), MeshAxes(data=2, model=2), MeshAxes(replica_dcn=2, data=2), MeshAxes(data=2, expert=2)],
    ids=lambda axes: str(axes),
)
@pytest.mark.parametrize("name", ["full", "blockwise"])
def test_a_mesh_changes_neither_loss_nor_gradient(name: CrossEntropyName, axes: MeshAxes, model: Transformer) -> None:
    batch = make_batch()
    loss_and_gradient = jax.value_and_grad(lambda m: loss_of(name)(m, batch, z_loss_weight=0.1))
    expected, expected_gradient = eqx.filter_jit(loss_and_gradient)(model)
    with jax.set_mesh(create_mesh(4, axes)):
        loss, gradient = eqx.filter_jit(loss_and_gradient)(model)
    assert_close(loss, expected, terms=LOSS_TERMS)
    assert_trees_close(gradient, expected_gradient, terms=GRADIENT_TERMS)


def test_devices_along_the_model_axis_share_out_the_logits() -> None:
    batch, config = make_batch(), replace(SMALL_MODEL, num_layers=1)

    def flops(axes: MeshAxes) -> float:
        mesh = create_mesh(4, axes)
        with jax.set_mesh(mesh):
            model = eqx.filter_jit(Transformer.init)(config, key=jax.random.key(0))
            placed = jax.device_put(batch, batch_sharding(mesh))
            loss = jax.jit(jax.grad(lambda m, b: loss_of("blockwise")(m, b)))
            cost = loss.lower(model, placed).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert flops(MeshAxes(data=2, model=2)) < 1.3 * flops(MeshAxes(data=4))


def test_in_bf16_the_gradient_of_a_common_token_adds_up() -> None:
    """It is a sum over tens of thousands of positions, which bf16's eight bits would not take in."""
    config = replace(SMALL_MODEL, num_layers=1)
    tokens = jax.random.geometric(jax.random.key(1), 0.3, (1024, 32), jnp.int32) % config.vocab_size
    batch = GrugLmExample(tokens, jnp.ones(tokens.shape, jnp.float32), make_batch().attn_mask)
    mesh = create_mesh(1024)
    with jax.set_mesh(mesh):
        model = eqx.filter_jit(Transformer.init)(config, key=jax.random.key(0))
        placed = jax.device_put(batch, batch_sharding(mesh))

        @eqx.filter_jit
        def gradient(model: Transformer, dtype: ComputeDtype) -> jax.Array:
            return jax.grad(lambda m: loss_of("auto")(m, placed, compute_dtype=dtype))(model).embed

        exact, rounded = (np.asarray(gradient(model, dtype)) for dtype in ("float32", "bfloat16"))
    assert np.linalg.norm(exact - rounded) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["full", "blockwise"])
def test_per_token_losses_add_up_to_the_loss(name: CrossEntropyName, model: Transformer) -> None:
    batch = make_batch()
    nats = eqx.filter_jit(per_token_loss)(model, batch, cross_entropy=name)
    mean = (nats * batch.loss_weight).sum() / batch.loss_weight.sum()
    assert_close(mean, loss_of(name)(model, batch), terms=LOSS_TERMS)
    with jax.set_mesh(create_mesh(4)):
        assert_close(eqx.filter_jit(per_token_loss)(model, batch, cross_entropy=name), nats, terms=LOSS_TERMS)


def test_no_scatter_and_no_gather_of_logits_in_the_gradient(model: Transformer) -> None:
    text = str(jax.make_jaxpr(jax.grad(lambda m: loss_of("full")(m, make_batch())))(model))
    scatters = [line for line in text.splitlines() if "scatter" in line and "300]" in line.split("=")[0]]
    assert not scatters


def test_a_batch_may_be_one_sequence(model: Transformer) -> None:
    batch = make_batch()
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    with jax.set_mesh(create_mesh(1, devices=jax.devices()[:1])):
        loss = eqx.filter_jit(loss_of("full"))(model, jax.device_put(one, jax.P(BATCH_AXES)))
    assert_close(loss, loss_of("full")(model, one), terms=LOSS_TERMS)


def test_a_batch_of_no_weight_has_no_loss(model: Transformer) -> None:
    batch = make_batch()
    empty = GrugLmExample(batch.tokens, jnp.zeros((4, 32)), batch.attn_mask)
    loss, gradient = jax.value_and_grad(lambda m: loss_of("full")(m, empty))(model)
    assert loss == 0 and all(bool((g == 0).all()) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["full", "blockwise"])
def test_bfloat16_is_near_and_leaves_the_loss_in_f32(name: CrossEntropyName, model: Transformer) -> None:
    batch = make_batch()
    of = jax.value_and_grad(lambda m, dtype: loss_of(name)(m, batch, compute_dtype=dtype))
    (loss, gradient), (exact, exact_gradient) = of(model, "bfloat16"), of(model, "float32")
    assert loss.dtype == jnp.float32
    off = jnp.linalg.norm(gradient.lm_head - exact_gradient.lm_head)
    assert off < 0.02 * jnp.linalg.norm(exact_gradient.lm_head)
    # Some eight results of each of two layers are rounded to bf16 on the way to a logit; sums are kept in f32.
    np.testing.assert_allclose(loss, exact, rtol=0, atol=tolerance(2 * 8, exact, "bfloat16"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("loss_weight", jnp.ones((4, 31)), ["loss_weight", "f32[4,31]", "B S"]),
        ("loss_weight", jnp.ones((4, 32), jnp.int32), ["loss_weight", "i32[4,32]"]),
        ("tokens", jnp.ones((4, 32)), ["tokens", "f32[4,32]", "Int"]),
        ("tokens", jnp.ones((32,), jnp.int32), ["tokens", "i32[32]", "B S"]),
    ],
)
def test_a_malformed_batch_is_refused_while_tracing(
    field: str, value: jax.Array, words: list[str], model: Transformer
) -> None:
    bad = replace(make_batch(), **{field: value})
    with pytest.raises(TypeCheckError) as error:
        eqx.filter_jit(next_token_loss)(model, bad)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("backend", "tokens", "vocab_size", "chosen"),
    [
        ("gpu", 4096, 8192, "full"),
        ("gpu", 4096, 50_304, "blockwise"),
        ("cpu", 4096, 8192, "blockwise"),
        ("cpu", 8, 8192, "full"),
    ],
)
def test_auto_chooses_by_backend_and_the_size_of_the_logits(
    backend: str, tokens: int, vocab_size: int, chosen: str
) -> None:
    name, reason = resolve_cross_entropy("auto", backend=backend, tokens=tokens, vocab_size=vocab_size)
    assert name == chosen and reason


def test_a_named_cross_entropy_is_obeyed() -> None:
    assert resolve_cross_entropy("full", backend="cpu", tokens=10**6, vocab_size=10**6)[0] == "full"


@pytest.mark.parametrize(
    ("backend", "tokens", "vocab_size", "block"),
    [
        (CPU, 4096, 50_304, 1024),
        (CPU, 100, 50_304, 100),
        (TPU, 16_384, 128_256, 1024),
        (HOPPER, 16_384, 50_304, 16_384),
        (HOPPER, 16_384, 128_256, 8192),
        (HOPPER, 17_000, 128_256, 8500),
        (HOPPER._replace(memory=None), 4096, 50_304, 1024),
    ],
)
def test_blocks_are_as_large_as_the_memory_of_a_gpu_lets_them(
    backend: Backend, tokens: int, vocab_size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "BLOCK_TOKENS", 1024)
    assert resolve_block(tokens, vocab_size, backend) == block


def test_blocks_that_are_unrolled_change_nothing() -> None:
    params = Transformer.init(SMALL_MODEL, key=jax.random.key(0))
    run = jax.jit(jax.value_and_grad(lambda params: loss_of("blockwise")(params, make_batch())))
    looped = run(params)
    # A GPU with memory for the logits of 50 tokens.
    with pretend(HOPPER._replace(memory=16 * 50 * 4 * SMALL_MODEL.vocab_size, cuda_capability=None)):
        unrolled = run(params)
    for a, b in zip(jax.tree.leaves(unrolled), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
