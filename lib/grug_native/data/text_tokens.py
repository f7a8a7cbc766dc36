"""How a text becomes tokens: all of it is text, and a document's EOS follows directly."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from levanter.tokenizers import MarinTokenizer
    from tokenizers import Tokenizer

EOS_FOLLOWS_TEXT = "eos_follows_text"
"""File in a token cache whose documents are the tokens of their text and EOS. levanter puts a space between them.

It is no part of the cache's own metadata, as levanter warns of any that differ from its own.
"""


def text_only(tokenizer: "MarinTokenizer") -> "MarinTokenizer":
    """A copy of a tokenizer that makes no special tokens: a text which spells one out is text there too."""
    from levanter.tokenizers import HfMarinTokenizer

    if not isinstance(tokenizer, HfMarinTokenizer) or tokenizer._tokenizer.encode_special_tokens:
        return tokenizer
    return replace(tokenizer, _tokenizer=_without_special_tokens(tokenizer._tokenizer))


@lru_cache(maxsize=8)
def _without_special_tokens(tokenizer: "Tokenizer") -> "Tokenizer":
    # levanter shares its tokenizers within the process, so theirs is left as it is.
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


@final
class DocumentTokenizer:
    """Turns documents into what is trained on: BOS, if the tokenizer has one, the tokens of the text, and EOS.

    The ids are levanter's but for two things: there is no space before EOS, and no text makes a special token.
    """

    def __init__(self, tokenizer: "MarinTokenizer", recorded_name: str):
        """Takes the tokenizer, and the name under which token caches record it."""
        from levanter.data.text.formats import TextLmDatasetFormat, preprocessor_for_format

        text_format = TextLmDatasetFormat()
        expected = preprocessor_for_format(text_format, tokenizer)
        self._texts = preprocessor_for_format(text_format, text_only(tokenizer), enforce_eos=False)
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.exemplar: dict[str, Any] = expected.output_exemplar
        """A row as token caches want to see one."""
        self.metadata: dict[str, Any] = expected.metadata | {"tokenizer": recorded_name}
        """What token caches record of how they were made."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each document."""
        return [[*row["input_ids"], *self._end] for row in self._texts([{"text": text} for text in texts])]
