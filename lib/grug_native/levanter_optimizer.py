"""levanter's optimizers behind our contract, as far as they can be used on raw arrays."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from grug_native.language_model import parameter_kinds

if TYPE_CHECKING:
    from levanter.optim.config import OptimizerConfig as LevanterOptimizerConfig
else:  # Importing levanter takes seconds; a config that does not use it should not pay for it.
    LevanterOptimizerConfig = Any


@dataclass(frozen=True, kw_only=True)
class LevanterOptimizer:
    """One of levanter's optimizers, with the numbers of its own config."""

    levanter: LevanterOptimizerConfig
    """levanter's config, such as `{type: adam, learning_rate: 0.001}`."""

    def build_schedule(self, num_train_steps: int) -> optax.Schedule:
        """Levanter's."""
        return self.levanter.lr_scheduler(num_train_steps)

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Levanter's."""
        return self.levanter.build(num_train_steps)

    def groups(self, params: PyTree) -> PyTree:
        """Levanter's.

        Raises:
            ValueError: if the optimizer cannot run on raw arrays, or sends all of them to its fallback.
        """
        return _levanter_groups(self.levanter, params)


def _levanter_groups(config: LevanterOptimizerConfig, params: PyTree) -> PyTree:
    name = type(config).__name__
    shapes = eqx.filter_eval_shape(lambda tree: tree, params)
    # levanter's multi-group optimizers label parameters by haliax's module classes, which raw arrays do not have.
    label = getattr(config, "create_mask", None)
    groups = jax.tree.map(lambda _: name, shapes) if label is None else label(shapes)
    labelled = list(zip(jax.tree.leaves(parameter_kinds(shapes)), jax.tree.leaves(groups), strict=True))
    shared = {group for kind, group in labelled if kind == "matrix"} & {g for kind, g in labelled if kind != "matrix"}
    if label is not None and shared:
        raise ValueError(
            f"optimizer.levanter={name} would send matrices of the blocks to {sorted(shared)}, as it does embedding or "
            "norms: it looks for haliax layers and finds raw arrays. Use type='muon' instead"
        )
    transform = config.build(1000)
    try:
        state = eqx.filter_eval_shape(transform.init, shapes)
        eqx.filter_eval_shape(transform.update, shapes, state, shapes)
    except Exception as error:
        raise ValueError(
            f"optimizer.levanter={name} does not run on raw arrays ({type(error).__name__}: {error}): "
            "use type='adamw', 'muon' or 'lion', or levanter's adam, lion, cautious or adopt"
        ) from error
    if label is None and any(map(_is_partition, jax.tree.leaves(state, is_leaf=_is_partition))):
        raise ValueError(f"optimizer.levanter={name} hides which group a parameter goes to: use type='muon' instead")
    mask = config.build_weight_decay_mask()
    decayed = jax.tree.map(lambda _: True, shapes) if mask is None else mask(shapes)
    decay = f", decay {config.weight_decay:g}" if config.weight_decay > 0 else ""
    return jax.tree.map(lambda group, decayed: f"{group}{decay if decayed else ''}", groups, decayed)


def _is_partition(node: object) -> bool:
    return isinstance(node, optax.transforms.PartitionState)
