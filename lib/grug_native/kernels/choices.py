"""What was left to us to decide, noted where it is decided: a plan traces the step and reads the notes."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Choice(NamedTuple):
    """A decision that was left to us."""

    what: str
    """What was to be decided."""
    name: str
    """What was chosen."""
    reason: str
    """Why, in words."""


_noted: ContextVar[dict[str, Choice] | None] = ContextVar("_noted", default=None)


@contextmanager
def noted_choices() -> Generator[dict[str, Choice]]:
    """Collects the choices that are made inside, by what was to be decided; of several, the first."""
    found: dict[str, Choice] = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note_choice(what: str, name: str, reason: str) -> None:
    """Notes a choice for whoever collects them."""
    found = _noted.get()
    if found is not None:
        found.setdefault(what, Choice(what, name, reason))
