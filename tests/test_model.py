from dataclasses import replace

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis
from jaxtyping import Array, Float
from levanter.data.text.examples import GrugLmExample, named_lm_example_from_grug
from levanter.grug.attention import AttentionMask

from experiments.benchmarks.peers.levanter_llama import to_llama
from grug_native.language_model import logits as logits_of
from grug_native.layers import RematName
from grug_native.loss import next_token_loss
from grug_native.model import MODEL_PRESETS, GrugModelConfig, Transformer
from grug_native.rotary import GrugRopeConfig
from grug_native.sharding import MeshAxes, create_mesh
from tests.fixtures_run import SMALL_MODEL, make_batch, without_runtime_types
from tests.tolerance import DRAW_TERMS, assert_close, assert_trees_close, forward_terms, gradient_terms, loss_terms

VARIANTS = {
    "gqa": SMALL_MODEL,
    "mha": replace(SMALL_MODEL, num_kv_heads=4),
    "mqa-wide-heads": replace(SMALL_MODEL, num_kv_heads=1, head_dim=16),
    "llama3-rope": replace(SMALL_MODEL, rope=GrugRopeConfig(theta=100.0, llama3_factor=8.0, original_max_seq_len=16)),
}


def with_mask(batch: GrugLmExample, kind: str) -> GrugLmExample:
    mask = batch.attn_mask
    if kind == "window":
        mask = mask.with_sliding_window(5)
    if kind == "packed-window":
        mask = make_batch(packed=True).attn_mask.with_sliding_window(5)
    if kind == "packed":
        mask = make_batch(packed=True).attn_mask
    return GrugLmExample(batch.tokens, batch.loss_weight, mask)


@pytest.mark.parametrize(
    ("name", "mask"),
    [("gqa", mask) for mask in ("causal", "packed", "window")] + [(name, "packed-window") for name in VARIANTS],
)
def test_logits_and_loss_equal_levanters_llama(name: str, mask: str) -> None:
    # Weights far from zero, so that a wrong rotation or mask cannot hide in small numbers.
    model = jax.tree.map(lambda w: 5 * w, Transformer.init(VARIANTS[name], key=jax.random.key(1)))
    batch = with_mask(make_batch(3), mask)
    llama = to_llama(model)
    example = named_lm_example_from_grug(batch, Axis("position", 32), batch_axis="batch")
    theirs = eqx.filter_jit(llama)(example.tokens, example.attn_mask).rearrange(("batch", "position", "vocab")).array
    config = VARIANTS[name]
    ours = eqx.filter_jit(logits_of)(model, batch.tokens, batch.attn_mask)
    assert_close(ours, theirs, terms=forward_terms(config, 32))
    their_loss = eqx.filter_jit(lambda llama: llama.compute_next_token_loss(example))(llama)
    assert isinstance(their_loss, jax.Array | hax.NamedArray)
    their_mean = np.asarray(getattr(their_loss, "array", their_loss))
    assert_close(eqx.filter_jit(next_token_loss)(model, batch)[0], their_mean, terms=loss_terms(config, 128, 32))


def test_no_position_sees_a_later_token_or_another_document() -> None:
    model, batch = Transformer.init(SMALL_MODEL, key=jax.random.key(0)), make_batch(packed=True, batch=1)
    assert batch.attn_mask.segment_ids is not None
    segments = np.asarray(batch.attn_mask.segment_ids[0][0])

    def logits(embedded: Float[Array, "S D"]) -> Float[Array, "S V"]:
        own = eqx.tree_at(lambda m: m.embed, model, jnp.zeros((300, 32)).at[batch.tokens[0]].set(embedded))
        return logits_of(own, batch.tokens, batch.attn_mask)[0]

    # Distinct tokens, so that each position has an embedding row of its own.
    batch = GrugLmExample(jnp.arange(32)[None], batch.loss_weight, batch.attn_mask)
    reach = np.abs(jax.jit(jax.jacobian(lambda e: logits(e).sum(-1)))(model.embed[:32])).sum(-1)
    allowed = (np.arange(32)[:, None] >= np.arange(32)[None, :]) & (segments[:, None] == segments[None, :])
    assert np.all(reach[~allowed] == 0)
    assert np.all(reach[allowed] > 0)


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (False, "dots"), (True, "full")])
def test_scan_and_remat_change_neither_loss_nor_gradient(scan: bool, remat: str) -> None:
    model, batch = Transformer.init(SMALL_MODEL, key=jax.random.key(0)), make_batch(packed=True)

    @eqx.filter_jit
    def grads(model: Transformer) -> tuple[Array, Transformer]:
        return jax.value_and_grad(lambda m: next_token_loss(m, batch)[0])(model)

    loss, gradient = grads(model)
    other = replace(model, config=replace(SMALL_MODEL, scan_layers=scan, remat=remat))
    other_loss, other_gradient = grads(other)
    assert_close(loss, other_loss, terms=loss_terms(SMALL_MODEL, 128, 32))
    assert_trees_close(gradient, other_gradient, terms=gradient_terms(SMALL_MODEL, 128, 32))


@pytest.mark.parametrize("axes", [MeshAxes(), MeshAxes(data=2, model=2), MeshAxes(replica_dcn=2, data=2)])
def test_a_mesh_changes_nothing_but_the_layout(axes: MeshAxes) -> None:
    batch = make_batch(packed=True)
    alone = Transformer.init(SMALL_MODEL, key=jax.random.key(0))
    expected = logits_of(alone, batch.tokens, batch.attn_mask)
    with jax.set_mesh(create_mesh(4, axes)):
        model = eqx.filter_jit(Transformer.init)(SMALL_MODEL, key=jax.random.key(0))
        assert jax.typeof(model.blocks.mlp.gate).sharding.spec == jax.P(None, "data", "model")
        logits = eqx.filter_jit(lambda m, b: logits_of(m, b.tokens, b.attn_mask))(model, batch)
    assert_close(model.embed, alone.embed, terms=DRAW_TERMS)
    assert_close(logits, expected, terms=forward_terms(SMALL_MODEL, 32))


def test_outside_of_its_mesh_the_model_says_so() -> None:
    batch = make_batch()
    with jax.set_mesh(create_mesh(4)):
        model = Transformer.init(SMALL_MODEL, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"with jax\.set_mesh\(runner\.mesh\)"):
        model.hidden(batch.tokens, batch.attn_mask)


def test_presets_have_the_speedruns_sizes() -> None:
    sizes = {
        name: (c.hidden_dim, c.intermediate_dim, c.num_layers, c.num_heads, c.max_seq_len, c.vocab_size)
        for name, c in MODEL_PRESETS.items()
        if name != "tiny"
    }
    assert sizes == {
        "130m": (512, 1792, 6, 8, 2048, 128_256),
        "300m": (768, 2688, 12, 12, 2048, 128_256),
        "520m": (1024, 3584, 24, 16, 2048, 128_256),
        "1_2b": (2048, 7168, 16, 16, 2048, 128_256),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, ["hidden_dim=32", "num_heads=5"]),
        ({"num_kv_heads": 3}, ["num_heads=4", "num_kv_heads=3"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"vocab_size": 0}, ["vocab_size=0", "positive"]),
        ({"num_layers": -1}, ["num_layers=-1", "positive"]),
        ({"attention": "flash"}, ["attention='flash'", "reference", "cudnn"]),
        ({"remat": "all"}, ["remat='all'", "dots"]),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes: dict[str, object], words: list[str]) -> None:
    with without_runtime_types(), pytest.raises(ValueError) as error:
        replace(SMALL_MODEL, **changes)
    assert all(word in str(error.value) for word in words)


def test_a_sequence_that_is_too_long_is_refused() -> None:
    model = Transformer.init(SMALL_MODEL, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"33 tokens is longer than model.max_seq_len=32"):
        model.hidden(jnp.zeros((1, 33), jnp.int32), AttentionMask.causal())


def test_every_parameter_is_annotated_with_its_shape() -> None:
    with pytest.raises(Exception, match="embed"):
        model = Transformer.init(SMALL_MODEL, key=jax.random.key(0))
        replace(model, embed=model.embed[0])


def test_a_config_is_hashable_data() -> None:
    assert hash(SMALL_MODEL) == hash(GrugModelConfig(**vars(SMALL_MODEL)))


def test_recomputing_more_holds_less() -> None:
    config = replace(
        SMALL_MODEL, hidden_dim=64, intermediate_dim=256, num_layers=8, num_kv_heads=4, attention="reference"
    )
    batch = make_batch(batch=64, seq_len=32)
    params = Transformer.init(config, key=jax.random.key(0))

    def working(remat: RematName) -> float:
        model = replace(params, config=replace(config, remat=remat))
        usage = jax.jit(jax.grad(lambda m: next_token_loss(m, batch)[0])).lower(model).compile().memory_analysis()
        assert usage is not None
        return usage.temp_size_in_bytes

    names: tuple[RematName, ...] = ("none", "dots", "full")
    assert sorted(names, key=working, reverse=True) == list(names)


def test_a_tied_head_is_the_embedding() -> None:
    tied = Transformer.init(replace(SMALL_MODEL, tie_embeddings=True), key=jax.random.key(1))
    untied = Transformer(
        embed=tied.embed, blocks=tied.blocks, final_norm=tied.final_norm, lm_head=tied.embed.T, config=SMALL_MODEL
    )
    batch = make_batch()
    one, other = (logits_of(model, batch.tokens, batch.attn_mask) for model in (tied, untied))
    np.testing.assert_array_equal(one, other)
    assert len(jax.tree.leaves(tied)) == len(jax.tree.leaves(untied)) - 1
    assert tied.flops_per_token(32) == untied.flops_per_token(32)
    gradient_of = jax.jit(jax.grad(lambda m: next_token_loss(m, batch)[0]))
    with jax.set_mesh(create_mesh([4], MeshAxes(data=2, model=2))):
        of_mesh = gradient_of(jax.jit(lambda: Transformer.init(tied.config, key=jax.random.key(1)))())
    gradient = gradient_of(tied)
    assert_trees_close(of_mesh, gradient, terms=gradient_terms(tied.config, 128, 32))
