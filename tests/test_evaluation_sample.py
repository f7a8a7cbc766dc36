from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import pytest
from levanter.tokenizers import HfMarinTokenizer

from grug_native.evaluation.drawing import Sampling
from grug_native.evaluation.generate import Prompt, Sampler
from grug_native.evaluation.sample import sample
from grug_native.sharding import create_mesh
from tests.fixtures_run import SMALL_MODEL

if TYPE_CHECKING:
    pass


SAMPLING = Sampling(temperature=0.8, top_p=0.9)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    mesh = create_mesh(4)
    with jax.set_mesh(mesh):
        params = replace(SMALL_MODEL, initializer_std=0.3).init(key=jax.random.key(0))
    return Sampler(params, mesh, 4)


def test_texts_are_continued_each_as_if_it_were_the_only_one(sampler: Sampler, tokenizer: HfMarinTokenizer) -> None:
    prompts = ["grug brain", "", f"say{tokenizer.eos_token}", "grug brain"]
    together = sample(sampler, tokenizer, prompts, seed=3, top_p=0.9)
    assert together == [sample(sampler, tokenizer, [prompt], seed=3, top_p=0.9)[0] for prompt in prompts]
    assert together[0] == together[3] != sample(sampler, tokenizer, prompts[:1], seed=4, top_p=0.9)[0]
    assert all(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))
    # With nobody to say how many, as many as there is room for; the spelling of EOS is text, and not EOS.
    ids = [tokenizer.encode(prompt) for prompt in ("grug brain", "say")]
    assert all(len(tokenizer.encode(text)) > 8 for text in together)
    wanted = [Prompt(own, 32 - len(own), SAMPLING, 3, tokenizer.eos_token_id) for own in ids]
    new = [tokenizer.decode([*own, *more]) for own, more in zip(ids, sampler.draw(wanted), strict=True)]
    assert new[0] == together[0] and not together[2].startswith(new[1])


def test_a_text_begins_after_bos_or_eos(sampler: Sampler, tokenizer: HfMarinTokenizer) -> None:
    with_bos = replace(tokenizer, _bos_id=7, _bos_token="x")
    [new] = sampler.draw([Prompt([7], 31, SAMPLING, 1, tokenizer.eos_token_id)])
    assert sample(sampler, with_bos, [""], top_p=0.9, seed=1) == [tokenizer.decode(new)]
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        sample(sampler, replace(tokenizer, _eos_id=None), [""])
