from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from grug_native.evaluation.until import cut_text, end_of_text

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig

LETTERS = "aböü\n"
TEXTS = st.text(LETTERS, max_size=12)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=3)


def letter_by_letter(text: str, stops: list[str]) -> str:
    """Reads until a stop string stands at the end, and takes the longest such away."""
    for end in range(len(text) + 1):
        if there := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, there))]
    return text


@given(text=TEXTS, stops=STOPS, further=TEXTS)
def test_a_text_ends_where_the_first_stop_string_is_complete(text: str, stops: list[str], further: str) -> None:
    assert cut_text(text, stops) == letter_by_letter(text, stops) == cut_text(text, stops[::-1])
    if end_of_text(text, stops) is not None:
        assert cut_text(text + further, stops) == cut_text(text, stops)


@settings(deadline=None)
@given(text=st.lists(st.sampled_from(["grug ", "brain", "say", "ö", "日", "🐕", "\n"])).map("".join), data=st.data())
def test_tokens_make_no_difference(small_corpus: "LmDataConfig", text: str, data: st.DataObject) -> None:
    """Nor do those that hold a part of a character, or parts of two words."""
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stops = [stop] if (stop := text[start : start + data.draw(st.integers(1, 7))]) else []
    tokenizer = small_corpus.the_tokenizer
    ids = tokenizer.encode(text)
    ends = [n for n in range(len(ids) + 1) if end_of_text(tokenizer.decode(ids[:n]), stops) is not None]
    assert ends == list(range(ends[0], len(ids) + 1)) if stops else not ends
    assert {cut_text(tokenizer.decode(ids[:n]), stops) for n in ends} <= {cut_text(text, stops)}
