"""Which tensors of a Hugging Face folder a parameter is made of."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from grug_native.language_model import HfForm, weight_at

type Index = tuple[slice, ...]


class Tensors(NamedTuple):
    """Of one parameter."""

    names: tuple[str, ...]
    """Of its tensors: one, or of stacked layers one for each."""
    shape: tuple[int, ...]
    """Of each of them."""
    stacked: bool
    """Whether the parameter has an axis of layers."""
    transposed: bool
    """Whether it is (in, out), and they are (out, in)."""

    def split(self, parameter: np.ndarray) -> Iterator[np.ndarray]:
        """The tensors that a parameter is written as."""
        for layer in parameter if self.stacked else (parameter,):
            yield layer.T if self.transposed else layer

    def blocks(self, index: Index) -> Iterator[tuple[str, Index]]:
        """Where a block of the parameter lies: the blocks of tensors of which `join` makes it."""
        layers, rest = (index[0], index[1:]) if self.stacked else (slice(None), index)
        for name in self.names[layers]:
            yield name, rest[::-1] if self.transposed else rest

    def join(self, blocks: list[np.ndarray]) -> np.ndarray:
        """The block of the parameter."""
        turned = [block.T if self.transposed else block for block in blocks]
        return np.stack(turned) if self.stacked else turned[0]

    def seen_from_here(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the parameter that tensors of another shape would make."""
        turned = shape[::-1] if self.transposed else shape
        return (len(self.names), *turned) if self.stacked else turned


def tensors_of(form: HfForm, params: PyTree) -> Mapping[str, Tensors]:
    """The tensors of each parameter, by its dotted path.

    Args:
        form: of the model.
        params: its parameters, concrete or abstract.

    Raises:
        ValueError: the form does not name one of them.
    """
    found: dict[str, Tensors] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        leaf_name = jax.tree_util.keystr(path, simple=True, separator=".")
        if leaf_name not in form.tensors:
            raise ValueError(f"to_hf() of the model's config says nothing of the parameter {leaf_name}")
        pattern, stacked = form.tensors[leaf_name], "{}" in form.tensors[leaf_name]
        names = tuple(pattern.format(layer) for layer in range(leaf.shape[0])) if stacked else (pattern,)
        shape = leaf.shape[1:] if stacked else leaf.shape
        transposed = weight_at(params, path).kind in ("matrix", "head")
        found[leaf_name] = Tensors(names, shape[::-1] if transposed else shape, stacked, transposed)
    return found
