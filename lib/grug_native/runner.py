"""The trainer: one object over one config, every step of which can be called by hand."""

from pathlib import Path
from typing import TYPE_CHECKING

import equinox as eqx
import jax
from jax.sharding import Mesh

from grug_native.config import GrugNativeRunConfig
from grug_native.optimizer import GrugOptimizer
from grug_native.parts import RunParts
from grug_native.state import GrugTrainState
from grug_native.train import StepMetrics, train_step

if TYPE_CHECKING:
    from levanter.data.text.examples import GrugLmExample


class GrugRunner(eqx.Module):
    """Trains a model as its config says: `GrugRunner(config).fit()`; or step by step, from IPython.

    Making one is cheap. Mesh, data and compiled functions are made on first use and shared by all methods.
    """

    config: GrugNativeRunConfig = eqx.field(static=True)
    """What to do."""
    optimizer: GrugOptimizer
    """How gradients become updates."""
    _parts: RunParts = eqx.field(static=True, repr=False)

    def __init__(self, config: GrugNativeRunConfig):
        """Takes the config; nothing is built yet.

        Raises:
            ValueError: if the learning-rate schedule does not fit in the run.
        """
        self.config = config
        self.optimizer = GrugOptimizer(config.optimizer, config.trainer.num_train_steps)
        if config.optimizer.levanter is None:
            config.optimizer.build_schedule(config.trainer.num_train_steps)
        self._parts = RunParts(config, self.optimizer)

    @property
    def mesh(self) -> Mesh:
        """The device mesh, with explicit axes `replica_dcn`, `data` and `model`."""
        return self._parts.mesh

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output_path)

    def init_state(self) -> GrugTrainState:
        """The state of step 0 on the run's mesh: a pure function of the config.

        Raises:
            ValueError: if the mesh does not fit the devices or the model, or the optimizer refuses the parameters.
        """
        return self._parts.init_state()

    def batch(self, step: int) -> "GrugLmExample":
        """The global batch of a step, on the devices: a pure function of the config and `step`."""
        from grug_native.data import batch_at

        return batch_at(self._parts.loader, step)

    def train_step(self, state: GrugTrainState, batch: "GrugLmExample") -> tuple[GrugTrainState, StepMetrics]:
        """One update; `state` is donated, so go on with the one returned. Compiled once per batch shape."""
        with jax.set_mesh(self.mesh):
            return train_step(self.optimizer, state, batch, config=self._parts.step_config)

    def fit(self, *, stop_after: int | None = None) -> GrugTrainState:
        """Trains to the end, from the newest checkpoint of the run or from the start.

        SIGTERM and SIGINT (Ctrl-C) save at the next step boundary; a script then exits with 128 + signal, an
        interactive session gets the state back.

        Args:
            stop_after: save and return after so many updates in all; the schedules stay those of the whole run.

        Raises:
            NonFiniteError: a step was not finite, or more were than `trainer.max_skipped_steps`.
            ValueError: the config cannot be what it says; found before anything is compiled.
        """
        from grug_native.loop import train

        return train(self._parts, stop_after=stop_after)


def run_grug_native(config: GrugNativeRunConfig) -> GrugTrainState:
    """`GrugRunner(config).fit()`, for callers who want a function."""
    return GrugRunner(config).fit()
