"""Where a text ends that is drawn until a stop string: in the text, whatever its tokens are.

A stop string may begin and end inside tokens, or stand in two and more of them; so may each of its characters.
"""

from collections.abc import Sequence


def end_of_text(text: str, stops: Sequence[str]) -> int | None:
    """Where a text ends: at the beginning of the stop string that is complete first, and of two the longer one.

    What stands behind that makes no difference, so a text may be drawn a little too far before it is looked at.

    Args:
        text: so far.
        stops: the stop strings, none of them empty.

    Returns:
        Characters before it; None if there is none.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def cut_text(text: str, stops: Sequence[str]) -> str:
    """A text up to its end; the whole of it, if there is no stop string in it."""
    return text[: end_of_text(text, stops)]
