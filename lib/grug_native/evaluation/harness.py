"""Tasks of lm-eval in the process of a run: which tasks, what they find, and the report.

Works without torch, and without network on local data. Importing this module imports lm-eval, which takes seconds;
nothing light may import it.
"""

import copy
import difflib
import json
import logging
import os
import random
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import jax
import numpy as np
from levanter.tokenizers import MarinTokenizer
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict, load_yaml
from lm_eval.utils import handle_non_serializable

from grug_native.evaluation.config import GrugHarnessConfig
from grug_native.evaluation.harness_lm import GrugLM, encoder_of
from grug_native.evaluation.harness_reports import add_report
from grug_native.evaluation.scoring import Scorer
from grug_native.host.shell import offer

_FEWSHOT_SEED = 1234
"""lm-eval's own default."""

_BOOTSTRAPS = 100
"""Resamplings behind a standard error that has no closed form (of perplexities, F1, ...)."""

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class GrugHarness:
    """The tasks of a run, loaded and ready; made by `build_harness`."""

    config: GrugHarnessConfig
    """What was asked for."""
    tokenizer: MarinTokenizer
    """Of the model."""
    tasks: TaskDict
    """What it came to."""

    def run(self, scorer: Scorer, *, step: int, folder: Path | None = None) -> dict[str, float]:
        """Runs the tasks. On several processes each must call it; all find the same.

        Args:
            scorer: the parameters, and how they are computed with.
            step: updates behind the parameters.
            folder: where process 0 adds the full report, under a name of its own; see `harness_reports.add_report`.

        Returns:
            `lm_eval/<task>/<metric>`, with a standard error `<metric>_stderr` where there is one. A metric of another
            filter than the default one has it in its name, as in levanter: `<metric>,<filter>`.

        Raises:
            UnwrittenReportError: the report cannot be written; the error has it, and the metrics.
        """
        started = time.perf_counter()
        with _left_as_found():
            model = GrugLM(scorer, self.tokenizer)
            for task in self.tasks["tasks"].values():
                task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            report = evaluator.evaluate(
                model,
                self.tasks,
                limit=self.config.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=self.config.log_samples,
            )
        assert report is not None and "results" in report
        seconds = time.perf_counter() - started
        contexts = {task: {"contexts": number, "cut": model.cut[task]} for task, number in model.requests.items()}
        for task, number in model.requests.items():
            if cut := model.cut[task]:
                logger.warning(
                    "task %r: %d of %d contexts do not fit into %d tokens, and have lost their beginning",
                    task,
                    cut,
                    number,
                    scorer.row_length,
                )
        run = {"step": step, "seconds": seconds, "tokens": model.tokens, "row_length": scorer.row_length}
        run |= {"cut_contexts": contexts}
        metrics = {
            f"lm_eval/{task}/{name.removesuffix(',none')}": float(value)
            for task, results in report["results"].items()
            for name, value in results.items()
            if "," in name and isinstance(value, int | float)
        }
        if folder is not None and jax.process_index() == 0:
            text = json.dumps({"run": run, **report}, indent=1, default=handle_non_serializable, ensure_ascii=False)
            add_report(folder, step, _names(self.config), text, metrics)
        return metrics


def build_harness(config: GrugHarnessConfig, tokenizer: MarinTokenizer, *, max_length: int) -> GrugHarness:
    """Finds the tasks, loads their documents and makes their requests: what cannot work fails before any training.

    Args:
        config: which tasks.
        tokenizer: of the model.
        max_length: tokens that the model is given at most.

    Raises:
        ValueError: if there is no such task, it executes code, it wants more examples than there are, or one of its
            documents does not fit into the model.
    """
    with _left_as_found():
        encoder, tasks = encoder_of(tokenizer, max_length), _load_tasks(config)
        for name, task in tasks["tasks"].items():
            _check_examples(name, task)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            task.build_all_requests(limit=config.limit)
            encoder.check(task.instances)
        return GrugHarness(config, tokenizer, tasks)


def _check_examples(name: str, task: Task) -> None:
    wanted = task.get_config("num_fewshot") or 0
    if wanted == 0:
        return
    there = len(list(task.fewshot_docs()))
    # Where examples come from the documents themselves, the one that is asked about is none of them.
    own = isinstance(task, ConfigurableTask) and task.fewshot_cfg.split == task.get_config("test_split")
    if wanted + own > there:
        most = max(there - own, 0)
        way_out = offer("eval.harness.num_fewshot", str(most))
        raise ValueError(
            f"eval.harness.num_fewshot: task {name!r} wants {wanted} examples before each document, and there are "
            f"{most} to take them from: lower it, as with {way_out} or --num_fewshot {most}"
        )


def _load_tasks(config: GrugHarnessConfig) -> TaskDict:
    manager = TaskManager(include_path=config.include_path, include_defaults=False)
    names = [task for task in config.tasks if isinstance(task, str) and not Path(task).is_file()]
    if missing := [name for name in names if name.endswith((".yaml", ".yml"))]:
        raise ValueError(f"eval.harness.tasks: there is no file {missing[0]!r}, seen from {Path.cwd()}")
    if any(name not in manager.task_index for name in names):
        logger.info("reading lm-eval's own tasks to find %s", names)
        manager = TaskManager(include_path=config.include_path, include_defaults=True)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(
                f"eval.harness.tasks: lm-eval knows no task {name!r}; near it are {close}. Otherwise, give the path of "
                "a YAML file, a config inline, or the folder of your own tasks as eval.harness.include_path"
            )
    for spec in config.tasks:
        _refuse_code(spec, manager)
    # lm-eval changes what it is given.
    tasks = manager.load(copy.deepcopy(list(config.tasks)))
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if config.num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=config.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


def _refuse_code(spec: str | Mapping[str, Any], manager: TaskManager) -> None:
    """Looks through a task, group or tag, before any document is fetched."""
    if isinstance(spec, str):
        entry = manager.task_index.get(spec)
        if entry is None:
            config: Mapping[str, Any] = load_yaml(spec, resolve_func=False) if Path(spec).is_file() else {}
        else:
            config = entry.cfg or {"task": sorted(entry.tags)}
    else:
        config = spec
    if config.get("unsafe_code"):
        raise ValueError(
            f"eval.harness.tasks: {config.get('task')!r} executes code that the model writes (unsafe_code: true). That "
            "code could do anything which the training process may do, so it is not run here: score saved checkpoints "
            "on such tasks in a sandbox of your own"
        )
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        _refuse_code(member, manager)
        if isinstance(member, Mapping) and member.get("task") in manager.task_index:
            _refuse_code(member["task"], manager)


@contextmanager
def _left_as_found() -> Generator[None]:
    """Restores the global random states; keeps lm-eval from forking a process that holds JAX's threads."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (others' state, not a source of numbers)
    alone = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone


def _names(config: GrugHarnessConfig) -> list[str]:
    """What was asked for, by name."""
    return [
        Path(task).stem if isinstance(task, str) else str(task.get("task") or task.get("group") or "task")
        for task in config.tasks
    ]
