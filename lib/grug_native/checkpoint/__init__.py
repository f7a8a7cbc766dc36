"""A run's checkpoints: written whole or not at all, proven when they are read, kept by rules."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grug_native.checkpoint.checkpointer import CheckpointPolicy, GrugCheckpointer

__all__ = ["CheckpointPolicy", "GrugCheckpointer"]


def __getattr__(name: str) -> object:
    # `grug ckpt` reads what is in this folder without Orbax.
    if name in __all__:
        return getattr(import_module("grug_native.checkpoint.checkpointer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
