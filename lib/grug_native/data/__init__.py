"""From text files to global batches on the devices, by levanter's caches, mixtures and loader."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grug_native.data.loader import build_train_dataset, build_train_loader, iter_from_step

__all__ = ["build_train_dataset", "build_train_loader", "iter_from_step"]


def __getattr__(name: str) -> object:
    # levanter's data stack takes seconds to import, and most of this folder does without.
    if name in __all__:
        return getattr(import_module("grug_native.data.loader"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
