import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from grug_native.debug import decode_batch, first_nonfinite, module_norms
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.loss import next_token_loss
from grug_native.model import Transformer
from grug_native.runner import GrugRunner
from grug_native.sharding import create_mesh
from tests.fixtures_run import SMALL_MODEL, MakeRun, make_batch
from tests.tolerance import assert_close, gradient_terms

# A norm adds up the squares of a leaf, of which the head is the largest.
TERMS = gradient_terms(SMALL_MODEL, 128, 32) + 32 * 300


def test_a_batch_as_text(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run())
    batch, tokenizer = runner.batch(3), runner.config.data.the_tokenizer
    shown = runner.show_batch(3)
    assert len(shown.rows) == 4
    for row, tokens in zip(shown.rows, np.asarray(batch.tokens).tolist(), strict=True):
        assert "".join(segment.text for segment in row) == tokenizer.decode(tokens)
        assert [segment.start for segment in row] == [sum(before.tokens for before in row[:n]) for n in range(len(row))]
        assert sum(segment.tokens for segment in row) == 32
    assert str(shown).startswith("row 0, 0+")
    assert repr(shown) == str(shown)


def test_segments_are_told_apart(make_run: MakeRun) -> None:
    tokenizer = make_run().data.the_tokenizer
    packed, plain = make_batch(packed=True), make_batch()
    starts = [[(segment.start, segment.tokens) for segment in row] for row in decode_batch(packed, tokenizer).rows]
    assert starts == [[(0, first), (first, 32 - first)] for first in (3, 4, 5, 6)]
    assert [len(row) for row in decode_batch(plain, tokenizer).rows] == [1] * 4


def init() -> Transformer:
    return Transformer.init(SMALL_MODEL, key=jax.random.key(0))


def test_norms_are_those_of_the_gradient_and_of_the_modules() -> None:
    params, batch = init(), make_batch(packed=True)
    norms = module_norms(params, batch)
    grads, _ = eqx.filter_jit(jax.grad(lambda p: next_token_loss(p, batch), has_aux=True))(params)
    assert_close(norms.gradients["lm_head"], jnp.linalg.norm(grads.lm_head), terms=TERMS)
    assert_close(norms.gradients["blocks.mlp.up"], jnp.linalg.norm(grads.blocks.mlp.up, axis=(1, 2)), terms=TERMS)
    assert_close(norms.parameters["final_norm.weight"], np.sqrt(32), terms=32)
    assert norms.gradients.keys() == norms.parameters.keys()
    assert f"activations embed                    {norms.activations['embed']:.3g}\n" in repr(norms)
    assert {name: value.shape for name, value in norms.activations.items()} == {
        "embed": (),
        "blocks.attn": (2,),
        "blocks.mlp": (2,),
        "blocks": (2,),
        "final_norm": (),
    }
    hidden, _, _ = eqx.filter_jit(params.hidden)(batch.tokens, batch.attn_mask)
    assert_close(norms.activations["final_norm"], jnp.sqrt(jnp.mean(hidden**2)), terms=hidden.size)


def test_norms_on_a_mesh_are_the_same(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run())
    state, batch = runner.init_state(), runner.batch(0)
    spread = runner.norms(state, batch)
    alone = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), (state.params, batch))
    expected = module_norms(*alone)
    for found, wanted in (
        (spread.gradients, expected.gradients),
        (spread.parameters, expected.parameters),
        (spread.activations, expected.activations),
    ):
        for name, value in wanted.items():
            assert_close(found[name], value, terms=TERMS)


def poison(leaf: Array, index: tuple[int, ...], value: float) -> Array:
    return leaf.at[index].set(value)


def test_the_first_leaf_that_is_not_finite_is_named() -> None:
    params = init()
    assert first_nonfinite(params) is None
    wk = poison(poison(params.blocks.attn.wk, (1, 2, 3), jnp.nan), (1, 5, 0), -jnp.inf)
    sick = eqx.tree_at(lambda p: (p.blocks.attn.wk, p.lm_head), params, (wk, params.head * jnp.nan))
    found = first_nonfinite({"params": sick, "step": jnp.array(3)})
    assert found is not None
    assert found == ("params.blocks.attn.wk", 1, 1, (1, 2, 3))


def test_the_computation_as_text(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run())
    stable, optimized = runner.hlo(), runner.hlo(optimized=True)
    assert "stablehlo.dot_general" in stable
    # Four devices share the parameters: they are gathered, and the gradients summed.
    assert "all-gather" in optimized
    assert "HloModule" in optimized


def test_a_donated_state_is_told_of_in_words(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run(eval=GrugEvalConfig(max_eval_batches=1)))
    state, batch = runner.init_state(), runner.batch(0)
    assert "step=0" in repr(state)  # JAX spares the memory of a number that was looked at
    runner.train_step(state, batch)
    assert "step=deleted" in repr(state)
    for use in (
        lambda: runner.train_step(state, batch),
        lambda: runner.sample(state, "grug"),
        lambda: runner.save(state),
        lambda: runner.evaluate(state),
        lambda: runner.norms(state, batch),
    ):
        with pytest.raises(ValueError, match="this state was given to train_step"):
            use()


def test_a_runner_is_short_to_print(make_run: MakeRun) -> None:
    text = repr(GrugRunner(make_run()))
    assert text.count("\n") == 0
    assert "34,720 parameters, 8 steps of 4 x 32 tokens, AdamWConfig" in text


def test_mesh_is_left_as_it_was(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run())
    state = runner.init_state()
    with jax.set_mesh(create_mesh(4)):
        before = jax.sharding.get_abstract_mesh()
        runner.sample(state, "grug", max_new_tokens=3)
        assert jax.sharding.get_abstract_mesh() == before
