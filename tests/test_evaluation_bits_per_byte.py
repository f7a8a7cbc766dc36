import json
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from levanter.data.passthrough_tokenizer import PassthroughTokenizer
from levanter.data.text._batch_tokenizer import BatchTokenizer
from levanter.tokenizers import MarinTokenizer, load_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from grug_native.data.text_tokens import DocumentTokenizer, text_only
from grug_native.evaluation.bits_per_byte import TokenBytes, bits_per_byte, exact_metrics, token_bytes
from tests.fixtures_data import WORDS, make_text
from tests.tolerance import tolerance

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig

VOCAB = 640
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _words() -> Iterator[str]:
    yield from make_text(0, 400).splitlines()


def _load(folder: Path, tokenizer: Tokenizer) -> MarinTokenizer:
    folder.mkdir()
    spec = json.loads(tokenizer.to_str())
    # As in a Llama: the bytes are tokens of the model, and no added ones.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return load_tokenizer(str(folder))


def _llama_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(_words(), trainer)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_words(), trainer)
    return tokenizer


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> MarinTokenizer:
    return _load(tmp_path_factory.mktemp("tokenizers") / "llama", _llama_like())


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> MarinTokenizer:
    return _load(tmp_path_factory.mktemp("tokenizers") / "unigram", _unigram())


@pytest.fixture(scope="module")
def byte_level(small_corpus: "LmDataConfig") -> MarinTokenizer:
    return small_corpus.the_tokenizer


def _count(table: TokenBytes, ids: list[int]) -> int:
    return int(table.first[ids[:1]].sum() + table.inside[ids[1:]].sum())


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(min_size=1), st.sampled_from(["<|endoftext|>", "<s>a</s>"])))
def test_the_tokens_of_any_text_hold_its_bytes(
    byte_level: MarinTokenizer, llama_like: MarinTokenizer, text: str
) -> None:
    for tokenizer, own in ((text_only(byte_level), text), (text_only(llama_like), text.replace("▁", "_"))):
        assert _count(token_bytes(tokenizer, VOCAB), tokenizer.encode(own)) == len(own.encode())


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1))
def test_metaspace_tokens_hold_the_bytes_of_text_in_their_alphabet(unigram: MarinTokenizer, words: list[str]) -> None:
    text = " ".join(words)
    assert _count(token_bytes(unigram, VOCAB), unigram.encode(text)) == len(text.encode())


def test_special_and_absent_tokens_have_no_bytes(byte_level: MarinTokenizer, llama_like: MarinTokenizer) -> None:
    for tokenizer in (byte_level, llama_like):
        table = token_bytes(tokenizer, VOCAB)
        assert tokenizer.eos_token_id is not None
        assert table.special[tokenizer.eos_token_id]
        assert not table.inside[table.special].any()
        assert not table.inside[len(tokenizer) :].any()
        assert table.inside.shape == (VOCAB,)
    # One character, several tokens: levanter's own count is three bytes for each of them.
    ids = byte_level.encode("🐕")
    assert len(ids) > 1
    assert _count(token_bytes(byte_level, VOCAB), ids) == 4


_of_predicted = jax.jit(TokenBytes.of_predicted)


def _text_bytes(table: TokenBytes, ids: list[int], *, levanters: bool) -> tuple[list[int], list[bool]]:
    # In front of a row of one length, so that it is compiled once.
    row = jnp.array([[0] * (160 - len(ids)) + ids])
    counts, is_text = jax.device_get(_of_predicted(table, row, jnp.array([levanters])))
    own = slice(160 - len(ids), 159)
    return counts[0, own].tolist(), is_text[0, own].tolist()


def test_a_word_after_a_special_token_begins_a_text(llama_like: MarinTokenizer) -> None:
    table = token_bytes(llama_like, VOCAB)
    assert llama_like.eos_token_id is not None
    word = llama_like.encode("grug brain")
    counted, is_text = _text_bytes(table, [*word, llama_like.eos_token_id, *word], levanters=False)
    # The first word of the row is predicted by nothing; the second text is counted in full.
    assert sum(counted[len(word) :]) == len("grug brain")
    assert sum(counted[: len(word) - 1]) == len("grug brain") - table.first[word[0]]
    assert is_text == [True] * (len(word) - 1) + [False] + [True] * len(word)


_PIECES = ["grug", "brain ", " ", "  ", "\n", "ö", "a<|endoftext|>b", "<|endoftext|>"]
_DOCUMENTS = st.lists(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=5).map("".join), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(texts=_DOCUMENTS)
def test_a_row_of_our_documents_counts_their_bytes(byte_level: MarinTokenizer, texts: list[str]) -> None:
    rows = DocumentTokenizer(byte_level, "")(texts)
    counted, is_text = _text_bytes(token_bytes(byte_level, VOCAB), [0, *chain(*rows)], levanters=False)
    assert sum(counted) == len("".join(texts).encode())
    # All that counts for nothing is the end of each.
    assert is_text.count(False) == len(texts)


@settings(max_examples=100, deadline=None)
@given(texts=_DOCUMENTS)
def test_a_row_of_levanters_documents_counts_their_bytes(
    byte_level: MarinTokenizer, llama_like: MarinTokenizer, texts: list[str]
) -> None:
    for tokenizer, eos in ((byte_level, "<|endoftext|>"), (llama_like, "</s>")):
        # A text in which a space stands before EOS reads as two.
        own = [text.replace("<|endoftext|>", eos).replace(f" {eos}", f"_{eos}") for text in texts]
        rows = [row["input_ids"] for row in BatchTokenizer(tokenizer, enforce_bos=False)([{"text": t} for t in own])]
        ids = [tokenizer.eos_token_id or 0, *chain(*rows)]
        counted, is_text = _text_bytes(token_bytes(tokenizer, VOCAB), ids, levanters=True)
        ends = [index - 1 for index, token in enumerate(ids) if token == ids[0] and index > 0]
        assert not all(is_text[end] for end in ends)
        # SentencePiece puts a space of its own before a text, and so before each part of one that a token cuts.
        if tokenizer is byte_level or not any(eos in text for text in own):
            assert sum(counted) == len("".join(own).encode())


def test_special_tokens_in_levanters_documents_count_as_they_are_spelled(llama_like: MarinTokenizer) -> None:
    table, eos, bos = token_bytes(llama_like, VOCAB), llama_like.eos_token_id, llama_like.bos_token_id
    assert eos is not None and bos is not None
    text = llama_like.encode("grug<s>brain")
    assert bos in text
    counted, is_text = _text_bytes(table, [eos, bos, *text, *llama_like.encode(" "), eos], levanters=True)
    # BOS at the start and EOS at the end are of no text.
    assert (is_text[0], is_text[-1]) == (False, False)
    assert counted[1 + text.index(bos)] == len("<s>")


def test_the_space_before_an_end_that_lies_in_the_next_row_is_left_out(byte_level: MarinTokenizer) -> None:
    table = token_bytes(byte_level, VOCAB)
    ids = byte_level.encode("grug ")
    counted, is_text = _text_bytes(table, ids, levanters=True)
    assert (counted[-1], is_text[-1]) == (0, False)
    counted, is_text = _text_bytes(table, ids, levanters=False)
    assert (counted[-1], is_text[-1]) == (1, True)


def test_tokenizers_that_hide_the_bytes_are_refused(tmp_path: Path) -> None:
    lower = Tokenizer(models.BPE())
    lower.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    lower.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower.decoder = decoders.ByteLevel()
    lower.train_from_iterator(
        _words(), trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    pieces = Tokenizer(models.WordPiece({"<unk>": 0, "grug": 1, "##s": 2}, unk_token="<unk>"))
    pieces.decoder = decoders.WordPiece()
    for name, tokenizer, size, message in (
        ("lower", lower, len(lower.get_vocab()), "does not keep the bytes"),
        ("pieces", pieces, 3, "WordPiece"),
    ):
        with pytest.raises(ValueError, match=message):
            token_bytes(_load(tmp_path / name, tokenizer), size)
    with pytest.raises(ValueError, match="knows no text"):
        token_bytes(PassthroughTokenizer(10), 10)


def test_exact_metrics_are_ratios_of_sums() -> None:
    nats, counts = np.array([10.0, 20.0, 40.0, 80.0]), np.array([1.0, 4.0, 4.0, 0.0])
    tags = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    metrics = exact_metrics(nats, counts, tags, ["py/code", "py/doc", "other"], {"py": [0, 1]}, prefix="eval")
    in_nats = {name: value * math.log(2) for name, value in metrics.items()}
    assert in_nats == pytest.approx(
        {
            "eval/bpb_exact": 150 / 9,
            "eval/macro_bpb_exact": (6 + 10) / 2,
            "eval/py/bpb_exact": 70 / 9,
            "eval/py/macro_bpb_exact": (6 + 10) / 2,
            "eval/py/code/bpb_exact": 6.0,
            "eval/py/doc/bpb_exact": 10.0,
        }
    )
    assert exact_metrics(nats, counts, tags[:, :1], ["one"], {}, prefix="e").keys() == {
        "e/bpb_exact",
        "e/one/bpb_exact",
    }


def test_sums_are_exact_over_large_sets() -> None:
    nats, counts = np.full(3_000_000, 1234.5, np.float32), np.full(3_000_000, 777.0, np.float32)
    exact = 1234.5 / 777 / math.log(2)
    assert bits_per_byte(nats, counts) == pytest.approx(exact, abs=tolerance(nats.size, exact, "float64"))
    assert bits_per_byte(nats[:2], np.zeros(2, np.float32)) is None
