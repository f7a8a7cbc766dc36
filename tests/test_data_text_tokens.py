from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from levanter.data.passthrough_tokenizer import PassthroughTokenizer
from levanter.tokenizers import HfMarinTokenizer

from grug_native.data.corpus_store import EOS
from grug_native.data.text_tokens import DocumentTokenizer, text_only

if TYPE_CHECKING:
    pass


TEXTS = st.lists(st.sampled_from([EOS, " ", "\n", "grug", "ö", "<|", "endoftext"])).map("".join)


@given(texts=st.lists(TEXTS, max_size=4))
def test_a_document_is_its_text_and_eos(tokenizer: HfMarinTokenizer, texts: list[str]) -> None:
    rows = DocumentTokenizer(tokenizer, "there")(texts)
    assert [tokenizer.decode(row) for row in rows] == [text + EOS for text in texts]
    assert [row.count(0) for row in rows] == [1] * len(texts)


def test_bos_and_eos_are_those_of_the_tokenizer(tokenizer: HfMarinTokenizer) -> None:
    [plain] = DocumentTokenizer(tokenizer, "there")(["grug"])
    assert DocumentTokenizer(replace(tokenizer, _bos_id=7, _bos_token="x"), "there")(["grug"]) == [[7, *plain]]
    without = DocumentTokenizer(replace(tokenizer, _eos_id=None, _eos_token=None), "there")
    assert without(["grug"]) == [plain[:-1]]
    made = DocumentTokenizer(tokenizer, "there").metadata
    assert (made["tokenizer"], made["append_eos"]) == ("there", True)


def test_special_tokens_are_not_made_of_text_and_levanters_tokenizer_stays(tokenizer: HfMarinTokenizer) -> None:
    text = text_only(tokenizer)
    assert tokenizer.eos_token_id not in text.encode(f"a {EOS}")
    assert tokenizer.encode(EOS) == [tokenizer.eos_token_id]
    assert text.decode(text.encode(f"a {EOS}")) == f"a {EOS}"
    assert text_only(text) is text
    ids = PassthroughTokenizer(10)
    assert text_only(ids) is ids
