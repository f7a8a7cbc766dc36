"""When and on what a run is evaluated: plain data, importable without levanter or lm-eval."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GrugHarnessConfig:
    """Tasks of lm-eval, run in the process of the training."""

    tasks: tuple[dict[str, Any] | str, ...]
    """What to run: a task's config inline, the path of its YAML file, or a name. A name that is not defined under
    `include_path` makes lm-eval read its own 14,000 tasks, which takes 20 seconds."""
    steps_per_harness: int | None = None
    """Steps from one run of the tasks to the next, counted from step 0; None runs them at the end only."""
    limit: int | None = None
    """Documents of each task at most; None takes them all."""
    num_fewshot: int | None = None
    """Examples in front of each document; None leaves it to the task. A task that says 0 keeps 0."""
    batch_size: int | None = None
    """Rows of a forward pass over all devices, and texts drawn at once; None means the evaluation batch size."""
    include_path: str | None = None
    """Folder of YAML files whose tasks may be asked for by name."""
    log_samples: bool = False
    """Put every document with the model's answers into the report."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("eval.harness.tasks is empty: name at least one task, or set eval.harness to null")
        for name in ("steps_per_harness", "limit", "batch_size"):
            _check_positive(f"eval.harness.{name}", getattr(self, name))
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"eval.harness.num_fewshot={self.num_fewshot} must not be negative")

    def is_due(self, step: int, num_train_steps: int) -> bool:
        """Whether the tasks are run after `step` updates."""
        return step == num_train_steps or (self.steps_per_harness is not None and step % self.steps_per_harness == 0)


@dataclass(frozen=True, kw_only=True)
class GrugEvalConfig:
    """Evaluation on the validation sets of the data config, and on tasks of lm-eval."""

    steps_per_eval: int | None = None
    """Steps from one evaluation to the next, counted from step 0; None evaluates at step 0 and at the end only."""
    eval_batch_size: int | None = None
    """Sequences per evaluation batch over all devices; None means the training batch size of step 0."""
    max_eval_batches: int | None = None
    """Batches per validation set at most; None takes them all."""
    eval_current: bool = True
    """Evaluate the parameters."""
    eval_ema: bool = True
    """Evaluate their moving average too, where the run keeps one."""
    compute_bpb: bool = True
    """Bits per byte beside the loss."""
    harness: GrugHarnessConfig | None = None
    """Tasks of lm-eval; None runs none, and imports nothing of it."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model continues at each evaluation, into `samples.md`."""
    sample_tokens: int = 64
    """Tokens of each such continuation."""

    def __post_init__(self) -> None:
        for name in ("steps_per_eval", "eval_batch_size", "max_eval_batches", "sample_tokens"):
            _check_positive(f"eval.{name}", getattr(self, name))
        if not self.eval_current and not self.eval_ema:
            raise ValueError("eval.eval_current and eval.eval_ema are both false: there is nothing to evaluate")

    def is_due(self, step: int, num_train_steps: int) -> bool:
        """Whether there is an evaluation after `step` updates."""
        at_an_end = step in (0, num_train_steps)
        return at_an_end or (self.steps_per_eval is not None and step % self.steps_per_eval == 0)


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"{name}={value} must be positive, or null")
