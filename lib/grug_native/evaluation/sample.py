"""Texts continued by a model, for `grug sample` and `samples.md`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grug_native.data.text_tokens import text_only
from grug_native.evaluation.drawing import Sampling
from grug_native.evaluation.generate import Prompt, Sampler

if TYPE_CHECKING:
    from levanter.tokenizers import MarinTokenizer

_NEW_TOKENS = 128
"""Drawn if nobody says how many."""


def sample(
    sampler: Sampler,
    tokenizer: "MarinTokenizer",
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Continues texts until the tokenizer's end of document, each as if it were the only one.

    A text begins as training documents do: after the tokenizer's BOS, if it has one. An empty prompt without one
    begins after EOS. The spelling of a special token is text.

    Args:
        sampler: the model.
        tokenizer: of the model.
        prompts: how the texts begin.
        max_new_tokens: of each at most; None draws at most 128, or as many as there is room for.
        temperature: as in `Sampling`.
        top_k: as in `Sampling`.
        top_p: as in `Sampling`.
        seed: of each drawing.

    Returns:
        The prompts with their continuations.

    Raises:
        ValueError: if a prompt and its new tokens do not fit in the model, or an argument cannot be used.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    texts = text_only(tokenizer).encode_batch(list(prompts))
    wanted: list[Prompt] = []
    for ids in texts:
        start = [] if bos is None else [bos]
        if not start and not ids:
            if eos is None:
                raise ValueError("the tokenizer has neither BOS nor EOS to begin a text with: give a prompt")
            start = [eos]
        room = sampler.params.config.max_seq_len - len(start) - len(ids)
        most = max(1, min(_NEW_TOKENS, room)) if max_new_tokens is None else max_new_tokens
        wanted.append(Prompt([*start, *ids], most, sampling, seed, eos))
    return [tokenizer.decode([*ids, *new]) for ids, new in zip(texts, sampler.draw(wanted), strict=True)]
