"""Exact bits per byte: the nats of the tokens of a text, over the bytes of the text.

The definition is that of `bits_per_byte` in lm-eval. The bytes are those of the documents in UTF-8, and the nats those
of the tokens that stand for them. What is put around a document has neither: BOS, EOS, and the space that levanter puts
before EOS, so what it costs the model to predict an end is not counted. Where the documents lie in sequences as in
lm-eval's rolling windows, both give the same number; where documents are packed end to end, a text may begin in the
middle of a sequence, and the first token of each sequence is predicted by nothing, and counts in neither sum.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grug_native.host.shell import offer
from grug_native.loss import next_tokens
from grug_native.sharding import BATCH_AXES, out_sharding

if TYPE_CHECKING:
    from levanter.tokenizers import MarinTokenizer

_PROBE = "Hello, world! 1 + 2 = 3\n\té 日本 🐕"
_WITHOUT = offer("eval.compute_bpb", "false")
_SPACE_MARK = "▁"
"""How SentencePiece spells a space."""


class TextBytes(NamedTuple):
    """What the token that each position predicts is of a text."""

    counts: Int[Array, "B S"]
    """Its bytes."""
    is_text: Bool[Array, "B S"]
    """Whether it stands for text; what is put around a document does not."""


class TokenBytes(eqx.Module):
    """How many bytes of text each token id stands for; 0 for special tokens and for ids that no token has.

    A token that holds a part of a character counts the bytes that it holds. Summed over the tokens of a text this is
    the length of the text in UTF-8, if the tokenizer keeps the text as it is: no normalisation, no unknown tokens.
    """

    inside: Int[Array, " V"] | Int[np.ndarray, " V"]
    """Bytes of a token within a text."""
    first: Int[Array, " V"] | Int[np.ndarray, " V"]
    """Bytes of a token that begins a text: less by one where the tokenizer itself has put a space in front."""
    special: Bool[Array, " V"] | Bool[np.ndarray, " V"]
    """Whether the token is a special one, so that a text begins after it."""
    spelled: Int[Array, " V"] | Int[np.ndarray, " V"]
    """Bytes of a special token's spelling, which levanter makes the token of where a text has it."""
    ends_in_space: Bool[Array, " V"] | Bool[np.ndarray, " V"]
    """Whether the last byte of the token is a space."""
    bos: int = eqx.field(static=True)
    """Id of the token that begins a document; -1 where there is none."""
    eos: int = eqx.field(static=True)
    """Id of the token that ends one; likewise."""

    def of_predicted(self, tokens: Int[Array, "B S"], spaces_before_eos: Bool[Array, " B"]) -> TextBytes:
        """Bytes of `tokens[b, s + 1]`, which position `s` predicts. The last position of a row means nothing.

        Args:
            tokens: of documents end to end.
            spaces_before_eos: whether each document of the row ends in a space that its text does not have, and in EOS.
                Then special tokens within documents are what their texts spelled out, and count as that. An EOS after a
                space ends a document: a text that spells that out reads as two, here as in levanter's attention masks.
        """
        predicted, spec = next_tokens(tokens), out_sharding(BATCH_AXES, None)

        def look_up(table: Array | np.ndarray, ids: Int[Array, "B S"]) -> Array:
            return jnp.asarray(table).at[ids].get(out_sharding=spec)

        special, after_space = look_up(self.special, predicted), look_up(self.ends_in_space, tokens)
        counts = jnp.where(
            look_up(self.special, tokens), look_up(self.first, predicted), look_up(self.inside, predicted)
        )
        around = ((predicted == self.eos) & after_space) | ((predicted == self.bos) & (tokens == self.eos))
        levanters = spaces_before_eos[:, None]
        spelled_out = levanters & special & ~around
        counts = jnp.where(spelled_out, look_up(self.spelled, predicted), counts)
        # Of the last token of a row it cannot be told whether EOS follows: it is left out, as the first of a row is.
        position = jnp.arange(tokens.shape[1])[None, :]
        ends = levanters & look_up(self.ends_in_space, predicted)
        before_eos = ends & (next_tokens(predicted) == self.eos) & (position < tokens.shape[1] - 2)
        unknown = ends & (position == tokens.shape[1] - 2)
        is_text = (~special | spelled_out) & ~(before_eos & (counts == 1)) & ~unknown
        return TextBytes(jnp.where(is_text, counts - before_eos, 0), is_text)


def token_bytes(tokenizer: "MarinTokenizer", vocab_size: int) -> TokenBytes:
    """Reads the bytes of each token off the tokenizer's vocabulary.

    Args:
        tokenizer: byte-level BPE, or SentencePiece, with or without byte fallback.
        vocab_size: rows of the model's embedding, at least the tokenizer's.

    Raises:
        ValueError: if the tokenizer is of another kind, or does not keep the bytes of a text.
    """
    from levanter.tokenizers import HfMarinTokenizer

    name = tokenizer.name_or_path
    if not isinstance(tokenizer, HfMarinTokenizer):
        raise ValueError(f"tokenizer {name!r} knows no text, and so no bytes: give {_WITHOUT}")
    # The one place where levanter keeps the kind of a tokenizer, and which of its added tokens are special.
    spec = json.loads(tokenizer._tokenizer.to_str())
    kinds = _decoder_kinds(spec["decoder"])
    if not kinds & {"ByteLevel", "Metaspace", "Replace"}:
        raise ValueError(
            f"tokenizer {name!r} decodes by {sorted(kinds)}, from which the bytes of a token cannot be told: "
            f"use a byte-level BPE or SentencePiece tokenizer, or give {_WITHOUT}"
        )
    added = {token["id"]: token for token in spec["added_tokens"]}
    special_ids = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token["special"])}
    inside, spelled = np.zeros(vocab_size, np.int32), np.zeros(vocab_size, np.int32)
    spaced, special, ends_in_space = (np.zeros(vocab_size, bool) for _ in range(3))
    for token, index in tokenizer.get_vocab().items():
        ends_in_space[index] = index not in special_ids and token.endswith((" ", "Ġ", _SPACE_MARK, "<0x20>"))
        if index in special_ids:
            special[index], spelled[index] = True, len(token.encode())
        elif index in added:
            inside[index] = len(token.encode())
        elif "ByteLevel" in kinds:  # Each character stands for one byte.
            inside[index], spaced[index] = len(token), token.startswith("Ġ")
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            inside[index] = 1
        else:
            inside[index] = len(token.replace(_SPACE_MARK, " ").encode())
            spaced[index] = token.startswith(_SPACE_MARK)
    puts_space = inside[tokenizer.encode("a")].sum() == 2
    first = inside - (spaced if puts_space else 0)
    bos, eos = (-1 if index is None else index for index in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    table = TokenBytes(inside, first, special, spelled, ends_in_space, bos, eos)
    _check_probe(table, tokenizer.encode(_PROBE), _unknown_id(spec["model"], tokenizer), name)
    return table


def bits_per_byte(nats: Float[np.ndarray, " N"], byte_counts: Float[np.ndarray, " N"]) -> float | None:
    """Total nats of tokens of text over total bytes of text, in bits; None where there are no bytes."""
    total = byte_counts.sum(dtype=np.float64)
    return float(nats.sum(dtype=np.float64) / total / math.log(2)) if total > 0 else None


def exact_metrics(
    nats: Float[np.ndarray, " N"],
    byte_counts: Float[np.ndarray, " N"],
    tags: Float[np.ndarray, "N K"],
    tag_names: Sequence[str],
    hierarchy: Mapping[str, Sequence[int]],
    *,
    prefix: str,
) -> dict[str, float]:
    """Bits per byte in total, of each tag and of each parent of tags, and the plain averages of the tags' own.

    Args:
        nats: summed over the weighted tokens of text of each sequence.
        byte_counts: likewise, of the bytes that these stand for.
        tags: 1 where a sequence has a tag.
        tag_names: of the columns of `tags`.
        hierarchy: for each parent its columns.
        prefix: of the metrics' names: `<prefix>/bpb_exact`, `<prefix>/<tag>/bpb_exact`, `<prefix>/macro_bpb_exact`.
    """
    metrics: dict[str, float | None] = {f"{prefix}/bpb_exact": bits_per_byte(nats, byte_counts)}
    by_tag = [bits_per_byte(nats * column, byte_counts * column) for column in tags.T]
    if len(tag_names) > 1:
        metrics[f"{prefix}/macro_bpb_exact"] = _mean(by_tag)
        for parent, columns in hierarchy.items():
            inside = tags[:, list(columns)].sum(axis=1)
            if parent not in tag_names:
                metrics[f"{prefix}/{parent}/bpb_exact"] = bits_per_byte(nats * inside, byte_counts * inside)
            metrics[f"{prefix}/{parent}/macro_bpb_exact"] = _mean([by_tag[column] for column in columns])
    metrics |= {f"{prefix}/{name}/bpb_exact": value for name, value in zip(tag_names, by_tag, strict=True)}
    return {name: value for name, value in metrics.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _decoder_kinds(decoder: Mapping[str, object] | None) -> set[str]:
    """Types of a `tokenizers` decoder and, where it is a sequence, of its parts."""
    if decoder is None:
        return set()
    parts = decoder.get("decoders")
    kinds = {str(decoder["type"])}
    return kinds.union(*(_decoder_kinds(part) for part in parts)) if isinstance(parts, list) else kinds


def _unknown_id(model: Mapping[str, object], tokenizer: "MarinTokenizer") -> int | None:
    unknown = model.get("unk_token")
    if isinstance(unknown, str):
        return tokenizer.get_vocab().get(unknown)
    index = model.get("unk_id")
    return index if isinstance(index, int) else None


def _check_probe(table: TokenBytes, ids: Sequence[int], unknown: int | None, name: str) -> None:
    if not ids or unknown in ids:
        return
    counted, true = int(table.first[ids[0]] + table.inside[np.array(ids[1:], int)].sum()), len(_PROBE.encode())
    if counted != true:
        raise ValueError(
            f"tokenizer {name!r} does not keep the bytes of a text: it makes {counted} of the {true} bytes of "
            f"{_PROBE!r}, so bits per byte would be wrong: give {_WITHOUT}"
        )
