"""Experts against the dense model with as many active operations: `python -m experiments.benchmarks.experts`.

Both are trained on the embedded corpus by AdamW, at equal tokens. Each takes the best of the same learning rates, found
with the first seed; then all seeds. Finished runs are kept in a file and not trained again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from experiments.benchmarks.measure import show, write_numbers
from experiments.benchmarks.optimizers import MODEL, Bench, OutOfRuns, Study, Trial, mean_end
from experiments.variants.moe import MixtureConfig
from grug_native import AdamWConfig, ScheduleConfig
from grug_native.language_model import ModelConfig
from grug_native.metrics import parameter_counts

STUDY = Study()
"""As Muon's: 300 steps of 16 sequences, three seeds."""

RATES = (1e-3, 2e-3, 4e-3)

MIXTURE = MixtureConfig(
    vocab_size=MODEL.vocab_size,
    hidden_dim=MODEL.hidden_dim,
    num_layers=MODEL.num_layers,
    num_heads=MODEL.num_heads,
    num_kv_heads=MODEL.num_kv_heads,
    max_seq_len=MODEL.max_seq_len,
    # 176 + 2 x 85 features, and the router: not more operations than the 352 features of the dense model.
    shared_dim=176,
    expert_dim=85,
)

MODELS: dict[str, ModelConfig] = {"dense": MODEL, "experts": MIXTURE}


def active_flops(model: ModelConfig) -> float:
    """Operations of a token, forward and backward."""
    shape = jax.eval_shape(lambda: model.init(key=jax.random.key(0)))
    return shape.flops_per_token(model.max_seq_len).causal


def main(argv: Sequence[str] | None = None, study: Study = STUDY, rates: Sequence[float] = RATES) -> None:
    """Runs the study, or goes on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/experts.jsonl"), help="file of the finished runs")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    parser.add_argument("--most", type=int, help="runs of each model to train now at most")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    rows: list[tuple[str, float, float, float, float, str]] = []
    start = AdamWConfig(schedule=ScheduleConfig(warmup=0.1))
    for name, model in MODELS.items():
        bench = Bench(replace(study, model=model), arguments.runs, arguments.cache_dir, arguments.most)

        def end(rate: float, bench: Bench = bench) -> float:
            return bench.run(Trial(replace(start, learning_rate=rate), study.steps, study.seeds[0])).final

        try:
            best = replace(start, learning_rate=min(rates, key=end))
            runs = [bench.run(Trial(best, study.steps, seed)) for seed in study.seeds]
        except OutOfRuns as pause:
            print(f"{name}: {len(bench.done)} runs are done; {pause}")
            return
        each = " ".join(f"{run.final:.4f}" for run in runs)
        parameters = parameter_counts(model)["total"]
        rows.append((name, active_flops(model), parameters, best.learning_rate, mean_end(runs), each))
    columns = ("model", "active FLOPs a token", "parameters", "rate", "mean bits/byte", f"seeds {study.seeds}")
    show(f"after {study.steps} steps", columns, rows)
    if arguments.json is not None:
        write_numbers(arguments.json, {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows})


if __name__ == "__main__":
    main()
