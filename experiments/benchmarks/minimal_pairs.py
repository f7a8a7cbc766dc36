"""Minimal pairs, in the form of BLiMP: which of two sentences does a model find likelier, before and after training?

    python -m experiments.benchmarks.minimal_pairs --data FOLDER --run runs/NAME

FOLDER holds one `.jsonl` file for each phenomenon, whose lines have `sentence_good` and `sentence_bad`.

References:
    Warstadt et al. 2020 (arXiv 1912.00582).
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grug_native import GrugOptimizer, load_config
from grug_native.checkpoint.orbax_io import load_params
from grug_native.components import RunParts
from grug_native.evaluation.config import GrugHarnessConfig
from grug_native.evaluation.harness import build_harness
from grug_native.evaluation.scoring import Scorer
from grug_native.host.run_folder import committed_steps, step_name


def minimal_pairs(file: Path) -> dict[str, Any]:
    """The task of one file: a sentence is scored whole, as the beginning of a document."""
    return {
        "task": file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def main() -> None:
    """Scores the first and the last parameters of a run, and prints the shares of pairs that they get right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of .jsonl files")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--limit", type=int, help="pairs of each file at most")
    arguments = parser.parse_args()

    files = sorted(arguments.data.glob("*.jsonl"))
    if not files:
        parser.error(f"there is no .jsonl file in {arguments.data}")
    config = load_config(arguments.run / "config.yaml")
    parts = RunParts(config, GrugOptimizer(config.optimizer, config.trainer.num_train_steps))
    checkpoints = arguments.run / "checkpoints"
    step = max(committed_steps(checkpoints))
    harness = build_harness(
        GrugHarnessConfig(tasks=tuple(map(minimal_pairs, files)), limit=arguments.limit),
        config.data.the_tokenizer,
        max_length=config.seq_len,
    )
    columns = {
        0: parts.init_state().params,
        step: load_params(checkpoints / step_name(step), parts.state_shape.params),
    }
    results = [
        harness.run(
            Scorer(params, parts.mesh, config.seq_len, parts.eval_batch_size, parts.step_config.compute_dtype),
            step=step,
        )
        for step, params in columns.items()
    ]
    table = Table("minimal pairs", *(f"step {step}" for step in columns))
    for file in files:
        name = f"lm_eval/{file.stem}/acc"
        table.add_row(file.stem, *(f"{metrics[name]:.1%} ± {metrics[f'{name}_stderr']:.1%}" for metrics in results))
    Console().print(table)


if __name__ == "__main__":
    main()
