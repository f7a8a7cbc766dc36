"""The trainer: one object over one config, every step of which can be called by hand."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload, override

import equinox as eqx
import jax
from jax.sharding import Mesh

from grug_native.components import RunParts
from grug_native.config import GrugNativeRunConfig, with_own_name
from grug_native.debug import BatchText, ModuleNorms
from grug_native.host.run_folder import is_bucket
from grug_native.metrics import parameter_counts
from grug_native.optimizer import GrugOptimizer
from grug_native.run_plan import RunPlan
from grug_native.state import GrugTrainState, is_deleted
from grug_native.train import StepMetrics

if TYPE_CHECKING:
    from levanter.data.text.examples import GrugLmExample
    from matplotlib.figure import Figure
else:
    Figure = Any


class GrugRunner(eqx.Module):
    """Trains a model as its config says: `GrugRunner(config).fit()`; or step by step, from IPython.

    Making one is cheap. Mesh, data and compiled functions are made on first use and shared by all methods.
    """

    config: GrugNativeRunConfig = eqx.field(static=True)
    """What to do; of a run that was renamed, under the name that it had."""
    optimizer: GrugOptimizer
    """How gradients become updates."""
    _parts: RunParts = eqx.field(static=True, repr=False)

    def __init__(self, config: GrugNativeRunConfig):
        """Takes the config; nothing is built yet.

        Raises:
            ValueError: if the learning-rate schedule does not fit in the run.
        """
        self.config = config = with_own_name(config)
        self.optimizer = GrugOptimizer(config.optimizer, config.trainer.num_train_steps)
        config.optimizer.build_schedule(config.trainer.num_train_steps)
        self._parts = RunParts(config, self.optimizer)

    @property
    def mesh(self) -> Mesh:
        """The device mesh, with explicit axes `replica_dcn`, `data` and `model`."""
        return self._parts.mesh

    @property
    def run_folder(self) -> Path:
        """Where the run writes; of a run in a bucket, the folder on this machine with its files."""
        from grug_native.bucket.place import files_of

        place = self.config.output_path
        return files_of(place) if is_bucket(place) else Path(place)

    def init_state(self) -> GrugTrainState:
        """The state of step 0 on the run's mesh: a pure function of the config.

        Raises:
            ValueError: if the mesh does not fit the devices or the model, or the optimizer refuses the parameters.
        """
        return self._parts.init_state()

    def batch(self, step: SupportsIndex) -> "GrugLmExample":
        """The global batch of a step (`state.step`, say), on the devices: a pure function of the config and `step`."""
        from grug_native.data.loader import batch_at

        return batch_at(self._parts.loader, step)

    def train_step(self, state: GrugTrainState, batch: "GrugLmExample") -> tuple[GrugTrainState, StepMetrics]:
        """One update; `state` is donated, so go on with the one returned. Compiled once per batch shape.

        Raises:
            ValueError: if the state was given to `train_step` before.
        """
        with self._using(state):
            return self._parts.compiled_step(batch.tokens.shape[0])(state, batch)

    def plan(self, *, compile: bool = False, measure: int = 0) -> RunPlan:
        """What the run is going to be, as a table and as data: sizes, routing, schedule, costs, choices.

        If it has begun, its data are opened, and all is checked that `fit` checks before it goes on.

        Args:
            compile: compile the train step, for its memory.
            measure: train so many steps, for their speed; nothing of it is kept.

        Raises:
            ValueError, OSError: whatever can be known to be wrong with the run.
        """
        from grug_native.plan import build_plan
        from grug_native.resume import check_resume

        check_resume(self._parts)
        return build_plan(self._parts, compile=compile, measure=measure)

    def evaluate(self, state: GrugTrainState) -> dict[str, float]:
        """Evaluates a state on the validation sets, as `config.eval` says; returns metrics by name.

        Raises:
            ValueError: if there are no validation sets, or the state was given to `train_step`.
        """
        from grug_native.hooks import evaluate_state

        with self._using(state):
            return evaluate_state(self._parts, state)

    def harness(
        self, state: GrugTrainState, tasks: Sequence[str | dict[str, Any]] | None = None, **settings: Any
    ) -> dict[str, float]:
        """Runs tasks of lm-eval on a state's parameters; the full report is added to `harness/`.

        Args:
            state: whose parameters are scored.
            tasks: names, paths of YAML files, or configs; None takes those of `config.eval.harness`.
            **settings: other fields of `GrugHarnessConfig`, such as `limit`.

        Raises:
            ValueError: if there is no such task, or it executes code; or the state was given to `train_step`.
        """
        from grug_native.hooks import harness_parameters

        with self._using(state):
            return harness_parameters(self._parts, state.params, int(state.step), tasks, **settings)

    @overload
    def sample(
        self,
        state: GrugTrainState,
        prompt: str = "",
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str: ...

    @overload
    def sample(
        self,
        state: GrugTrainState,
        prompt: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]: ...

    def sample(
        self,
        state: GrugTrainState,
        prompt: str | Sequence[str] = "",
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str | list[str]:
        """Continues a text, or several at once, with a state's parameters; see `grug_native.evaluation.sample`."""
        from grug_native.hooks import sample_parameters

        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        prompts = [prompt] if isinstance(prompt, str) else prompt
        with self._using(state):
            texts = sample_parameters(self._parts, state.params, prompts, seed=seed, **settings)
        return texts[0] if isinstance(prompt, str) else texts

    def export(
        self,
        state: GrugTrainState,
        output: str | Path,
        *,
        ema: bool = False,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> Path:
        """Writes a state's parameters as a Hugging Face folder; see `grug_native.export.export_state`.

        Args:
            state: whose parameters are written; `restore()` gives that of a checkpoint.
            output: a folder that is not there yet.
            ema: take the moving average of the parameters.
            dtype: of what is written.

        Returns:
            The folder.

        Raises:
            ValueError: it exists, or the model's architecture has no such form; or the state was given to `train_step`.
            OSError: it cannot be written; then nothing of it is left.
        """
        from grug_native.export import export_state

        with self._using(state):
            return export_state(self._parts, state, output, ema=ema, dtype=dtype)

    def save(self, state: GrugTrainState) -> Path:
        """Saves a state as `checkpoints/step-N`, and waits until it is there.

        Returns:
            That folder; of a run in a bucket, what the names of its objects begin with, below the run's URL.

        Raises:
            RunLockedError: another process is writing to the run's folder.
            CheckpointError: the run has newer checkpoints, or the state is not finite.
            ValueError: the checkpoints are of another config, or the state was given to `train_step`.
        """
        from grug_native.saving import save_state

        with self._using(state):
            where = save_state(self._parts, state)
        return Path(where.removeprefix(f"{self.config.output_path}/") if is_bucket(where) else where)

    def restore(self, step: int | None = None) -> GrugTrainState:
        """Loads the state of a checkpoint, the newest by default.

        Raises:
            ValueError: there is no such checkpoint, or it is of another config, data or model.
            DamagedCheckpointError: it is not what was saved.
        """
        from grug_native.saving import restore_state

        return restore_state(self._parts, step)

    def plot(self) -> "Figure":
        """Draws the run's curves, into `loss.png` in its folder and as a figure.

        Raises:
            ValueError: if the run has logged nothing yet.
        """
        from grug_native.tracking.jsonl import METRICS_FILE
        from grug_native.tracking.plot import PLOT_FILE, plot_runs, write_picture

        place = self.config.output_path
        if not is_bucket(place):
            figure = plot_runs([self.run_folder])
            write_picture(figure, self.run_folder / PLOT_FILE)
            return figure
        from grug_native.bucket.place import fetched, write_file

        folder = fetched(place, [METRICS_FILE])
        figure = plot_runs([folder])
        write_picture(figure, folder / PLOT_FILE)
        write_file(place, PLOT_FILE, (folder / PLOT_FILE).read_bytes())
        return figure

    def show_batch(self, step: SupportsIndex) -> BatchText:
        """The batch of a step as text, sequence by sequence, its documents apart."""
        from grug_native.debug import decode_batch

        return decode_batch(self.batch(step), self._parts.tokenizer)

    def norms(self, state: GrugTrainState, batch: "GrugLmExample") -> ModuleNorms:
        """Gradients, parameters and activations, module by module and layer by layer; `state` is left as it is."""
        from grug_native.debug import module_norms

        with self._using(state):
            return module_norms(state.params, batch, compute_dtype=self._parts.step_config.compute_dtype)

    def hlo(self, *, optimized: bool = False) -> str:
        """The train step as text: StableHLO, or what the compiler made of it."""
        from grug_native.debug import hlo_text

        return hlo_text(self._parts, optimized=optimized)

    def fit(self, *, stop_after: int | None = None, resume_step: int | None = None) -> GrugTrainState:
        """Trains to the end, from the newest checkpoint of the run or from the start.

        SIGTERM, SIGINT (Ctrl-C) and SIGHUP save at the next step boundary; a script then exits with 128 + signal, an
        interactive session gets the state back. At the end the curves are drawn into `loss.png`.

        Args:
            stop_after: save and return after so many updates in all; the schedules stay those of the whole run.
            resume_step: go back to the checkpoint of this step, or with 0 to the start; newer checkpoints are renamed
                `.abandoned-step-N`, and what was logged since is cut off.

        Raises:
            NonFiniteError: a step was not finite, or more were than `trainer.max_skipped_steps`.
            ValueError: the config cannot be what it says; found before anything is compiled.
        """
        from grug_native.loop import train

        state = train(self._parts, stop_after=stop_after, resume_step=resume_step)
        if jax.process_index() == 0 and int(state.step) > 0:
            self.plot()
        return state

    @contextmanager
    def _using(self, state: GrugTrainState) -> Generator[None]:
        if is_deleted(state):
            raise ValueError(
                "this state was given to train_step, which reuses its memory: go on with the state that train_step "
                "returned, or restore() one"
            )
        with jax.set_mesh(self.mesh):
            yield

    @override
    def __repr__(self) -> str:
        config = self.config
        parameters = parameter_counts(config.model)["total"]
        return (
            f"GrugRunner({config.run_id!r} in {config.output_path!r}: {parameters:,} parameters, "
            f"{config.trainer.num_train_steps:,} steps of {config.trainer.train_batch_size} x {config.seq_len} tokens, "
            f"{type(config.optimizer).__name__})"
        )


def run_grug_native(config: GrugNativeRunConfig) -> GrugTrainState:
    """`GrugRunner(config).fit()`, for callers who want a function."""
    return GrugRunner(config).fit()
