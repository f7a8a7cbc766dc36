"""Evaluation of a run: in its loop, or by hand of a state or a checkpoint."""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import jax

from grug_native.bucket.place import files_of
from grug_native.components import RunParts
from grug_native.evaluation.config import GrugHarnessConfig
from grug_native.evaluation.harness_reports import UnwrittenReportError
from grug_native.host.fault_injection import fault_point
from grug_native.host.run_folder import is_bucket, local_path
from grug_native.host.signals import StopRequestedError, leave_if_told_to_stop
from grug_native.language_model import LanguageModel
from grug_native.state import GrugTrainState
from grug_native.tracking.jsonl import RunTracker

if TYPE_CHECKING:
    from grug_native.evaluation.perplexity import TaggedEval

logger = logging.getLogger(__name__)

HARNESS_FOLDER = "harness"
"""Where in a run's folder the full reports of its tasks are."""

SAMPLES_FILE = "samples.md"
"""Where in a run's folder the samples of its evaluations are."""

_SHOWN = ("eval/loss", "eval/bpb_exact", "eval/ema/loss", "eval/ema/bpb_exact")


def evaluate_parameters(parts: RunParts, params: LanguageModel, *, ema: bool = False) -> dict[str, float]:
    """Evaluates parameters on the validation sets; the metrics' names begin with `eval/`, or `eval/ema/`.

    Raises:
        ValueError: if there are no validation sets.
    """
    return _tagged(parts).evaluate(params, prefix="eval/ema" if ema else "eval")


def evaluate_state(parts: RunParts, state: GrugTrainState) -> dict[str, float]:
    """Evaluates a state's parameters, and their moving average as `config.eval` says.

    Raises:
        ValueError: if there are no validation sets.
    """
    _ = _tagged(parts)
    assert parts.evaluation is not None
    return parts.evaluation(state)


def _tagged(parts: RunParts) -> "TaggedEval":
    if parts.tagged is None:
        raise ValueError("no component of the data config has a validation split: there is nothing to evaluate on")
    return parts.tagged


def harness_parameters(
    parts: RunParts,
    params: LanguageModel,
    step: int,
    tasks: Sequence[str | dict[str, Any]] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Runs tasks of lm-eval on parameters, and adds the full report to `harness/` as `step-N-TASKS.json`.

    Args:
        parts: of the run.
        params: on the run's mesh.
        step: updates behind them.
        tasks: names, paths of YAML files, or configs; or one name; None takes those of `config.eval.harness`.
        **settings: other fields of `GrugHarnessConfig`, in place of the run's own.

    Raises:
        ValueError: if no task is named, there is no such task, or it executes code.
        UnwrittenReportError: the report cannot be written; the error has it, and the metrics.
    """
    from grug_native.evaluation.harness import build_harness
    from grug_native.evaluation.scoring import Scorer

    run, own = parts.config, parts.config.eval.harness
    if tasks is not None:
        settings |= {"tasks": (tasks,) if isinstance(tasks, str) else tuple(tasks)}
    elif own is None:
        raise ValueError("name the tasks: the run's config has none in eval.harness")
    config = GrugHarnessConfig(**settings) if own is None else replace(own, **settings)
    scorer = Scorer(
        params=params,
        mesh=parts.mesh,
        row_length=run.seq_len,
        batch_size=parts.eval_batch_size if config.batch_size is None else config.batch_size,
        compute_dtype=parts.step_config.compute_dtype,
    )
    if config == own and parts.harness is not None:
        harness = parts.harness
    else:
        harness = build_harness(config, parts.tokenizer, max_length=run.seq_len)
    with jax.set_mesh(parts.mesh):
        if not is_bucket(run.output_path):
            return harness.run(scorer, step=step, folder=local_path(run.output_path) / HARNESS_FOLDER)
        from grug_native.bucket.reports import reports_folder

        patience = 60 * run.trainer.store_patience_minutes
        with reports_folder(run.output_path, HARNESS_FOLDER, patience=patience) as reports:
            reports.metrics = harness.run(scorer, step=step, folder=reports.folder)
        return reports.metrics


def sample_parameters(parts: RunParts, params: LanguageModel, prompts: Sequence[str], **settings: Any) -> list[str]:
    """Continues texts with parameters of a run; see `grug_native.evaluation.sample.sample` for the settings."""
    from grug_native.evaluation.generate import Sampler
    from grug_native.evaluation.sample import sample

    sampler = Sampler(params, parts.mesh, parts.eval_batch_size, parts.step_config.compute_dtype)
    return sample(sampler, parts.tokenizer, prompts, **settings)


@final
class Evaluations:
    """What the loop does between steps: held-out sets, tasks and samples, when they are due.

    One that fails is no reason to lose the run: it is logged and counted, and the loop fails at its end. Of several
    processes, though, the one in which it fails ends, since the others are in the middle of it and would wait for ever.
    """

    def __init__(self, parts: RunParts, tracker: RunTracker, *, start_step: int = 0):
        """Takes the run and where its metrics go; builds nothing. Samples from `start_step` on go, to be redone."""
        self._parts = parts
        self._tracker = tracker
        samples = files_of(parts.config.output_path) / SAMPLES_FILE
        if jax.process_index() == 0 and samples.exists():
            samples.write_text(_samples_before(start_step, samples.read_text()))
        self.failed = 0
        """Evaluations that raised."""
        self.seconds = 0.0
        """Time spent so far."""

    def check(self, state: GrugTrainState) -> None:
        """Evaluates a sequence of each set, loads the tasks, measures the prompts: what cannot work raises now."""
        from grug_native.evaluation.generate import check_room

        started = time.perf_counter()
        config = self._parts.config
        with suppress(StopRequestedError):
            for prompt in config.eval.sample_prompts:
                check_room(config.model, 1 + len(self._parts.tokenizer.encode(prompt)), config.eval.sample_tokens)
            if self._parts.tagged is not None:
                self._parts.tagged.check_one_batch(state.params)
            _ = self._parts.harness
        self.seconds += time.perf_counter() - started

    def is_due(self, step: int) -> bool:
        """Whether there is anything to do after `step` updates."""
        return self._eval_is_due(step) or self._harness_is_due(step)

    def run(self, state: GrugTrainState, step: int) -> None:
        """Does what is due after `step` updates, and logs it; leaves off when the process is told to stop."""
        started = time.perf_counter()
        if self._eval_is_due(step) and self._parts.evaluation is not None:
            self._guard("the evaluation", step, lambda: self._evaluate(state, step))
        if self._eval_is_due(step) and self._parts.config.eval.sample_prompts:
            self._guard("sampling", step, lambda: self._sample(state, step))
        if self._harness_is_due(step):
            self._guard("the harness", step, lambda: self._run_tasks(state, step))
        self.seconds += time.perf_counter() - started

    def _eval_is_due(self, step: int) -> bool:
        return self._parts.config.eval.is_due(step, self._parts.config.trainer.num_train_steps)

    def _harness_is_due(self, step: int) -> bool:
        harness = self._parts.config.eval.harness
        return harness is not None and harness.is_due(step, self._parts.config.trainer.num_train_steps)

    def _guard(self, what: str, step: int, evaluate: Callable[[], None]) -> None:
        try:
            leave_if_told_to_stop()
            evaluate()
        except StopRequestedError:
            logger.info("%s after %d steps is left to the process that resumes here", what, step)
        except Exception:  # whatever it was, it is not the training
            if jax.process_count() > 1:
                raise  # The others wait in a collective for what this one gave up.
            self.failed += 1
            logger.exception("%s after %d steps failed; training goes on", what, step)

    def _evaluate(self, state: GrugTrainState, step: int) -> None:
        fault_point("eval", step, process=jax.process_index())
        assert self._parts.evaluation is not None
        started = time.perf_counter()
        metrics = self._parts.evaluation(state)
        self._log(metrics, step)
        shown = ", ".join(f"{name} {metrics[name]:.4f}" for name in _SHOWN if name in metrics)
        logger.info("step %d: %s (%.1f s)", step, shown, time.perf_counter() - started)

    def _run_tasks(self, state: GrugTrainState, step: int) -> None:
        try:
            metrics = harness_parameters(self._parts, state.params, step)
        except UnwrittenReportError as error:
            self._log(error.metrics, step)
            raise
        self._log(metrics, step)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        self._tracker.log(metrics, step=step)

    def _sample(self, state: GrugTrainState, step: int) -> None:
        config, parts = self._parts.config, self._parts
        prompts, most = config.eval.sample_prompts, config.eval.sample_tokens
        texts = sample_parameters(parts, state.params, prompts, max_new_tokens=most, seed=step)
        path, heading = files_of(config.output_path) / SAMPLES_FILE, f"## Step {step}\n"
        if jax.process_index() != 0:
            return
        with path.open("a") as file:
            file.write(heading + "".join(f"\n```text\n{text}\n```\n" for text in texts) + "\n")


def _samples_before(step: int, text: str) -> str:
    first, *later = re.split(r"^(?=## Step \d+$)", text, flags=re.MULTILINE)
    return first + "".join(section for section in later if int(section.split(maxsplit=3)[2]) < step)
