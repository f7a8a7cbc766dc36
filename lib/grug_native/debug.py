"""Looking into a run: a batch as text, norms by module, the first leaf that is not finite, the computation as text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, override

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, PyTree

from grug_native.loss import ComputeDtype, next_token_loss
from grug_native.mesh import BATCH_AXES, batch_sharding, constrain, out_sharding
from grug_native.model import Transformer, cast_parameters, unstack
from grug_native.parts import RunParts
from grug_native.rotary import rotary_tables
from grug_native.train import lower_train_step
from grug_native.types import LmBatch

if TYPE_CHECKING:
    from levanter.data.text.examples import GrugLmExample
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
    """Root mean square of what the embedding, each attention, MLP and block, and the final norm give out."""

    @override
    def __str__(self) -> str:
        return "\n".join(
            f"{kind} {name:<24} {' '.join(f'{float(norm):.3g}' for norm in np.atleast_1d(values))}"
            for kind in ("gradients", "parameters", "activations")
            for name, values in getattr(self, kind).items()
        )

    __repr__ = __str__


def module_norms(params: Transformer, batch: LmBatch, *, compute_dtype: ComputeDtype = "float32") -> ModuleNorms:
    """Measures gradients, parameters and activations on a batch. Call it under the mesh of the parameters."""
    gradients, parameters, activations = jax.device_get(_norms(params, batch, compute_dtype))
    return ModuleNorms(gradients, parameters, activations)


@eqx.filter_jit
def _norms(
    params: Transformer, batch: LmBatch, compute_dtype: ComputeDtype
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    grads = jax.grad(lambda p: next_token_loss(p, batch, compute_dtype=compute_dtype))(params)
    return _leaf_norms(grads), _leaf_norms(params), _activations(params, batch, compute_dtype)


def _leaf_norms(model: Transformer) -> dict[str, Array]:
    def norm(path: tuple[jax.tree_util.KeyEntry, ...], leaf: Array) -> tuple[str, Array]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        summed = tuple(range(1 if name.startswith("blocks.") else 0, leaf.ndim))
        return name, jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=summed))

    return dict(norm(path, leaf) for path, leaf in jax.tree.leaves_with_path(model))


def _activations(params: Transformer, batch: LmBatch, compute_dtype: ComputeDtype) -> dict[str, Array]:
    """The forward pass of `Transformer.__call__`, looked at between the modules."""
    config, model = params.config, cast_parameters(params, compute_dtype)

    def size(x: Float[Array, "B S D"]) -> Float[Array, ""]:
        return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))

    x = constrain(model.embed, None, None).at[batch.tokens].get(out_sharding=out_sharding(BATCH_AXES, None, None))
    found: dict[str, list[Array]] = {"blocks.attn": [], "blocks.mlp": [], "blocks": []}
    embed, rope = size(x), rotary_tables(config.rope, config.features_per_head, batch.tokens.shape[1])
    for block in unstack(model.blocks, config.num_layers):
        attended = block.attn(block.attn_norm(x, eps=config.layer_norm_eps), rope, batch.attn_mask, config)
        x = x + attended
        transformed = block.mlp(block.mlp_norm(x, eps=config.layer_norm_eps))
        x = x + transformed
        for name, output in (("blocks.attn", attended), ("blocks.mlp", transformed), ("blocks", x)):
            found[name].append(size(output))
    final = size(model.final_norm(x, eps=config.layer_norm_eps))
    return {"embed": embed, **{name: jnp.stack(sizes) for name, sizes in found.items()}, "final_norm": final}


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


def lower_step(parts: RunParts) -> jax.stages.Lowered:
    """The train step of a run, lowered for its largest batch; nothing is allocated, and no data are opened."""
    with jax.set_mesh(parts.mesh):
        return lower_train_step(parts.optimizer, parts.state_shape, _abstract_batch(parts), config=parts.step_config)


def hlo_text(parts: RunParts, *, optimized: bool = False) -> str:
    """The train step of a run as text.

    Args:
        parts: of the run.
        optimized: the HLO that the compiler made of it, for these devices, instead of the StableHLO that it is given.
    """
    lowered = lower_step(parts)
    text = lowered.compile().as_text() if optimized else lowered.as_text()
    assert text is not None
    return text


def _abstract_batch(parts: RunParts) -> "GrugLmExample":
    from levanter.data.text.examples import GrugLmExample
    from levanter.grug.attention import AttentionMask

    config = parts.config
    shape = (max(size for _, size in config.trainer.batch_stages), config.seq_len)

    def abstract(dtype: type) -> Any:  # It stands for an array, and is none.
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(parts.mesh))

    mask = AttentionMask.causal()
    if config.data.block_cross_document_attention:
        mask = replace(mask, segment_ids=(abstract(jnp.int32), abstract(jnp.int32)))
    return GrugLmExample(abstract(jnp.int32), abstract(jnp.float32), mask)
