"""The contract of a model: what training, evaluation, scoring and sampling ask of an architecture, and nothing else.

An architecture is one file: a frozen dataclass of its numbers with `init`, and a final subclass of `LanguageModel`
whose weights say what they are where they stand,
`wq: Float[Array, "D Q"] = eqx.field(metadata=weight("matrix", "data", "model"))`.
`grug_native.model.Transformer` is the first; `experiments/variants` has others.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from grug_native.sharding import AxisName, check_divides, reshard
from grug_native.types import AttentionMask

ParameterKind = Literal["embedding", "head", "norm", "matrix"]
"""What a weight is to an optimizer. `norm` is for all that is neither a table nor a matrix: gains, biases, scalars."""

type Path = tuple[Any, ...]
"""Where a leaf stands in a pytree: `jax.tree_util` keys."""


class Aux(eqx.Module):
    """What a forward pass has to say beside its hidden states. One more number is one more entry."""

    losses: dict[str, Float[Array, ""]] = eqx.field(default_factory=dict)
    """Added to the training loss as they are, so weighted already; logged under their names."""
    metrics: dict[str, Array] = eqx.field(default_factory=dict)
    """Logged under their names; of a vector, each number under `NAME/0`, `NAME/1`, ..."""
    activations: dict[str, Array] = eqx.field(default_factory=dict)
    """Root mean squares of what modules give out, for `runner.norms`. Where nobody reads them, nobody pays."""


class FlopsPerToken(NamedTuple):
    """Floating-point operations of one training token, forward and backward, without recomputation."""

    full: float
    """Attention counted over the whole square, as levanter and PaLM do."""
    causal: float
    """Half of the square, which is what a causal model needs."""


def transformer_flops(*, matrices: int, attention_features: int, seq_len: int) -> FlopsPerToken:
    """`6 M + 12 A S` and `6 M + 6 A S` operations a token.

    Args:
        matrices: numbers of the matrices that a token is multiplied with, the head among them and the embedding not
            (`M`); of experts, the active ones.
        attention_features: heads times features, added up over the layers (`A`).
        seq_len: tokens of a sequence (`S`).

    References:
        Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B).
    """
    scores = attention_features * seq_len
    return FlopsPerToken(full=6.0 * matrices + 12.0 * scores, causal=6.0 * matrices + 6.0 * scores)


@runtime_checkable
class ModelConfig(Protocol):
    """What a model's config has to have, whatever else it has. It is a frozen dataclass of plain data."""

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Longest sequence, in tokens."""
        ...

    def init(self, *, key: PRNGKeyArray) -> "LanguageModel":
        """Draws the weights, in f32, and lays them out with `shard_parameters`."""
        ...


class HfForm(NamedTuple):
    """A model as Hugging Face's libraries know it: what an export writes, and what `trainer.init_from` reads."""

    config: Mapping[str, Any]
    """Of `config.json`, all but what the tokenizer and the dtype add."""
    tensors: Mapping[str, str]
    """By the dotted path of each parameter the name of its tensor, `{}` in it for the layer of one that is stacked.
    Matrices and heads are (in, out) here and (out, in) there."""
    ignored: tuple[str, ...] = ()
    """Endings of names of tensors that a folder may have besides, and that say nothing."""


@runtime_checkable
class HfModelConfig(Protocol):
    """What a `ModelConfig` has besides, if its model can go to a Hugging Face folder and come from one."""

    def to_hf(self) -> HfForm:
        """The form of this model; a `ValueError` if these numbers have none."""
        ...

    def from_hf(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The config that a `config.json` promises; it may be a static method, as nothing of this one counts.

        Raises:
            ValueError: names what of it this architecture does not have.
        """
        ...


def hf_form(config: ModelConfig) -> HfForm:
    """The Hugging Face form of a model.

    Raises:
        ValueError: if its architecture, or these numbers, have none; says what to write.
    """
    if not isinstance(config, HfModelConfig):
        kind = type(config)
        raise ValueError(
            f"{kind.__module__}:{kind.__qualname__} has no form in Hugging Face's libraries: give the class to_hf() "
            "and from_hf() as grug_native.model:GrugModelConfig has them, if an architecture there computes the same"
        )
    return config.to_hf()


class LanguageModel(eqx.Module):
    """A causal language model: its weights are its leaves."""

    config: eqx.AbstractVar[Any]
    """A `ModelConfig`, as a static field."""

    @abstractmethod
    def hidden(
        self, tokens: Int[Array, "B S"], mask: AttentionMask, *, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B S D"], Aux, PyTree | None]:
        """The states of which `unembed` makes logits. The only forward pass.

        Args:
            tokens: ids below `config.vocab_size`; larger ones would be clamped by JAX, so they are checked on the host.
            mask: which positions may attend to which.
            cache: of the positions before `tokens`; the mask's segment ids are those of `tokens`, and with a cache they
                tell padding from text too. None: there is nothing before them.

        Returns:
            The states, in the dtype of the weights; what else there is to say; the longer cache, or None without one.
        """

    @abstractmethod
    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Unnormalised log-probabilities of the next token, in f32: a function of each position alone.

        The only place where logits are made: scales, soft caps and tied heads belong here.
        """

    @abstractmethod
    def init_cache(self, batch: int, length: int, dtype: str) -> PyTree:
        """An empty cache for `length` positions of `batch` sequences, its numbers in `dtype`, split as the batch is."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> FlopsPerToken:
        """Operations of a training token at sequences of `seq_len` tokens; shapes suffice for it."""


_METADATA = "grug_native.weight"


class Weight(NamedTuple):
    """What a weight is, said by its field."""

    kind: ParameterKind
    """What it is to an optimizer."""
    axes: tuple[AxisName, ...]
    """Mesh axes of the axes of one layer's weight; further axes on the left (layers) are not split."""


def weight(kind: ParameterKind, *axes: AxisName) -> dict[str, Weight]:
    """Metadata of a field that is a weight: `eqx.field(metadata=weight(...))`.

    Args:
        kind: what it is to an optimizer.
        *axes: for each of its axes the mesh axes over which that is split; None for one that every device has whole.
    """
    if kind not in get_args(ParameterKind):
        raise ValueError(f"weight({kind!r}) is of no known kind: choose one of {', '.join(get_args(ParameterKind))}")
    return {_METADATA: Weight(kind, axes)}


def parameter_kinds(params: PyTree) -> PyTree:
    """The kind of each parameter, in a tree of the same shape.

    Raises:
        ValueError: if a parameter stands in no field made by `weight`: names it.
    """
    return jax.tree.map_with_path(lambda path, _: weight_at(params, path).kind, params)


def weight_at(tree: PyTree, path: Path) -> Weight:
    """What the leaf at a path is, said by the nearest field on the way to it.

    Raises:
        ValueError: if none says so.
    """
    node, found = tree, None
    for entry in path:
        match entry:
            case jax.tree_util.GetAttrKey(name=name):
                fields = (
                    {item.name: item for item in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
                )
                found = fields[name].metadata.get("grug_native.weight", found) if name in fields else found
                node = getattr(node, name)
            case jax.tree_util.SequenceKey(idx=key) | jax.tree_util.DictKey(key=key):
                node = cast(Any, node)[key]
            case _:
                break
    if found is None:
        raise ValueError(
            f"parameter {jax.tree_util.keystr(path)} does not say what it is: declare its field with "
            'eqx.field(metadata=weight("matrix", "data", "model"))'
        )
    return found


def parameter_axes(weight: Weight, ndim: int) -> tuple[AxisName, ...]:
    """Mesh axes of all axes of a weight, those of the layers among them."""
    return (*(None for _ in range(ndim - len(weight.axes))), *weight.axes)


def shard_parameters[Tree: PyTree](model: Tree) -> Tree:
    """Lays the parameters out over the ambient explicit mesh, each as its field says.

    Raises:
        ValueError: if an axis does not divide over the devices.
    """

    def shard(path: Path, leaf: Array) -> Array:
        axes = parameter_axes(weight_at(model, path), leaf.ndim)
        for number, axis in enumerate(axes):
            if isinstance(axis, str):
                check_divides(f"parameter {jax.tree_util.keystr(path)}.shape[{number}]", leaf.shape[number], axis)
        return reshard(leaf, *axes)

    return jax.tree.map_with_path(shard, model)


def map_weights[Tree: PyTree](function: Callable[..., Array], model: Tree) -> Tree:
    """`function(weight, *axes)` of each parameter, with the mesh axes of its axes."""
    return jax.tree.map_with_path(
        lambda path, leaf: function(leaf, *parameter_axes(weight_at(model, path), leaf.ndim)), model
    )


def axis_sizes(model: PyTree, axis: str) -> set[int]:
    """Lengths of the axes of parameters that are split over a mesh axis."""
    sizes: set[int] = set()
    for path, leaf in jax.tree.leaves_with_path(model):
        axes = parameter_axes(weight_at(model, path), leaf.ndim)
        sizes |= {size for size, own in zip(leaf.shape, axes, strict=True) if own == axis}
    return sizes


def cast_parameters[Tree: PyTree](model: Tree, dtype: str) -> Tree:
    """The same model with every weight in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def abstract_parameters(config: ModelConfig) -> LanguageModel:
    """The model as shapes and dtypes: nothing is drawn and nothing allocated."""
    return eqx.filter_eval_shape(lambda key: config.init(key=key), jax.random.key(0))


def logits(model: LanguageModel, tokens: Int[Array, "B S"], mask: AttentionMask) -> Float[Array, "B S V"]:
    """Unnormalised log-probabilities of the token after each position, in f32."""
    return model.unembed(model.hidden(tokens, mask)[0])


def leaf_norms(tree: PyTree) -> dict[str, Array]:
    """L2 norms of parameters, or of what is shaped like them, by name; of layers, an array over them."""

    def norm(path: Path, leaf: Array) -> tuple[str, Array]:
        own = weight_at(tree, path).axes
        summed = tuple(range(leaf.ndim - len(own), leaf.ndim))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return name, jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=summed))

    return dict(norm(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree))


def root_mean_square(x: Array) -> Float[Array, ""]:
    """How large the numbers of an array are, in f32."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
