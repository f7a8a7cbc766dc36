from dataclasses import dataclass
from pathlib import Path

from experiments.config_reference import field_docstrings, reference

FILE = Path(__file__).parent.parent / "docs" / "config.md"


@dataclass
class _Example:
    plain: int
    told: int = 1
    """What it is,
    on two lines."""

    def method(self) -> None:
        """No field's."""


def test_the_file_is_what_the_program_prints() -> None:
    assert FILE.read_text() == reference(), "run python -m experiments.config_reference > docs/config.md"


def test_the_text_under_a_field_is_its_meaning() -> None:
    assert field_docstrings(_Example) == {"told": "What it is, on two lines."}
