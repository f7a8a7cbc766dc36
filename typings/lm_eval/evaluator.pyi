from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.result_schema import EvalResults
from lm_eval.tasks.manager import TaskDict, TaskManager

def simple_evaluate(
    model: str | LM,
    model_args: str | dict[str, str | int | float] | None = None,
    tasks: list[str | dict[str, Any] | Task] | None = None,
    num_fewshot: int | None = None,
    *,
    limit: int | float | None = None,
    bootstrap_iters: int = 100000,
    log_samples: bool = True,
    task_manager: TaskManager | None = None,
    confirm_run_unsafe_code: bool = False,
) -> EvalResults | None: ...
def evaluate(
    lm: LM,
    task_dict: TaskDict,
    limit: int | float | None = None,
    *,
    bootstrap_iters: int | None = 100000,
    write_out: bool = False,
    log_samples: bool = True,
) -> EvalResults | None: ...
