"""Looking into a run: a batch as text, norms by module, the first leaf that is not finite, the computation as text."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, override

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from grug_native.components import RunParts
from grug_native.language_model import LanguageModel, leaf_norms
from grug_native.loss import ComputeDtype, next_token_loss
from grug_native.train import lower_train_step
from grug_native.types import LmBatch

if TYPE_CHECKING:
    from levanter.tokenizers import MarinTokenizer

_SHOWN_CHARACTERS = 300


class Segment(NamedTuple):
    """A stretch of a sequence that attends to nothing outside of it: a document, or what of it is in the sequence."""

    start: int
    """Position of its first token."""
    tokens: int
    """Its length."""
    text: str
    """Its tokens, decoded."""


@dataclass(frozen=True, repr=False)
class BatchText:
    """A batch decoded back to text; it prints shortened, and `rows` has all of it."""

    rows: tuple[tuple[Segment, ...], ...]
    """The segments of each sequence, in order."""

    @override
    def __str__(self) -> str:
        lines: list[str] = []
        for number, row in enumerate(self.rows):
            for segment in row:
                text = segment.text
                cut = repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")
                lines.append(f"row {number}, {segment.start}+{segment.tokens}: {cut[1:-1]}")
        return "\n".join(lines)

    __repr__ = __str__


def decode_batch(batch: LmBatch, tokenizer: "MarinTokenizer") -> BatchText:
    """Decodes a batch, sequence by sequence and segment by segment; with several processes, each must call this."""
    tokens = np.asarray(multihost_utils.process_allgather(batch.tokens, tiled=True))
    segment_ids = batch.attn_mask.segment_ids
    ids = (
        np.zeros_like(tokens)
        if segment_ids is None
        else np.asarray(multihost_utils.process_allgather(segment_ids[0], tiled=True))
    )

    def row(number: int) -> tuple[Segment, ...]:
        stretches = [list(group) for _, group in groupby(range(tokens.shape[1]), key=lambda s: ids[number, s])]
        return tuple(
            Segment(stretch[0], len(stretch), tokenizer.decode(tokens[number, stretch].tolist()))
            for stretch in stretches
        )

    return BatchText(tuple(row(number) for number in range(tokens.shape[0])))


@dataclass(frozen=True, repr=False)
class ModuleNorms:
    """How large things are, module by module. What belongs to a layer is an array over the layers."""

    gradients: Mapping[str, np.ndarray]
    """L2 norm of the loss' gradient with respect to each parameter, before clipping."""
    parameters: Mapping[str, np.ndarray]
    """L2 norm of each parameter."""
    activations: Mapping[str, np.ndarray]
    """Root mean squares of what the model's parts give out, those that its `Aux.activations` names."""

    @override
    def __str__(self) -> str:
        return "\n".join(
            f"{kind} {name:<24} {' '.join(f'{float(norm):.3g}' for norm in np.atleast_1d(values))}"
            for kind in ("gradients", "parameters", "activations")
            for name, values in getattr(self, kind).items()
        )

    __repr__ = __str__


def module_norms(params: LanguageModel, batch: LmBatch, *, compute_dtype: ComputeDtype = "float32") -> ModuleNorms:
    """Measures gradients, parameters and activations on a batch. Call it under the mesh of the parameters."""
    gradients, parameters, activations = jax.device_get(_norms(params, batch, compute_dtype))
    return ModuleNorms(gradients, parameters, activations)


@eqx.filter_jit
def _norms(
    params: LanguageModel, batch: LmBatch, compute_dtype: ComputeDtype
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    grads, aux = jax.grad(lambda p: next_token_loss(p, batch, compute_dtype=compute_dtype), has_aux=True)(params)
    return leaf_norms(grads), leaf_norms(params), aux.activations


class NonFinite(NamedTuple):
    """A leaf that holds something other than finite numbers."""

    path: str
    """Where it is in the tree, as in `params.blocks.attn.wq`."""
    nans: int
    """How many of its numbers are NaN."""
    infinities: int
    """How many are infinite."""
    first: tuple[int, ...]
    """Index of the first of either; of a block's parameter, the first number is the layer."""


def first_nonfinite(tree: PyTree) -> NonFinite | None:
    """Finds the first leaf of a state, of gradients or of anything else, that is not finite; None if all are."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array)):
        if bool(jnp.all(jnp.isfinite(leaf))):
            continue
        values = np.asarray(leaf, np.float32)
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NonFinite(name, int(np.isnan(values).sum()), int(np.isinf(values).sum()), bad)
    return None


def hlo_text(parts: RunParts, *, optimized: bool = False) -> str:
    """The train step of a run as text.

    Args:
        parts: of the run.
        optimized: the HLO that the compiler made of it, for these devices, instead of the StableHLO that it is given.
    """
    if optimized:
        text = parts.compiled_step().executable.as_text()
    else:
        with jax.set_mesh(parts.mesh):
            lowered = lower_train_step(
                parts.optimizer, parts.state_shape, parts.batch_shape(), config=parts.step_config
            )
        text = lowered.as_text()
    assert text is not None
    return text
