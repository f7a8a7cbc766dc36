"""Where a run's first parameters come from: plain data, importable without JAX."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Parameters that a run starts with, in place of fresh ones; step, optimizer and data start anew."""

    source: str
    """A run, by its folder or URL, or a Hugging Face folder of a Llama."""
    step: int | None = None
    """Of a run, which checkpoint; None takes the newest."""
    ema: bool = False
    """Of a run, take the moving average of its parameters."""
    digest: str | None = None
    """What the parameters have to be, as a hash of the digests of all; a run records it in its
    `config.yaml`. None takes whatever is there."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("trainer.init_from.source is empty: give the folder of a run, or of Hugging Face's files")
        if self.step is not None and self.step < 0:
            raise ValueError(f"trainer.init_from.step={self.step} must not be negative")

    @property
    def in_words(self) -> str:
        """Where they are from and what they are, for the lineage of checkpoints."""
        averaged = ", moving average" if self.ema else ""
        step = "" if self.step is None else f", step {self.step}"
        return f"step 0: parameters of {self.source}{step}{averaged}, digest {self.digest}"


def spelled_out(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a config, `trainer.init_from` of text taken for its `source`."""
    trainer = sections.get("trainer")
    if not isinstance(trainer, Mapping) or not isinstance(trainer.get("init_from"), str):
        return dict(sections)
    own = cast(Mapping[str, Any], trainer)
    return {**sections, "trainer": {**own, "init_from": {"source": own["init_from"]}}}
