"""Our `fit()`: data from levanter's token cache, every step logged to `metrics.jsonl`.

It is held inside the call that logs a step, before the next one is waited for. `Turn.calls` is `throughput/duration`
without `throughput/loading_time`; of the step after a wait it holds the wait.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from experiments.benchmarks.peers import ours, shapes
from experiments.benchmarks.peers.shapes import Job
from grug_native import GrugNativeRunConfig, GrugRunner, GrugTrainerConfig
from grug_native.data.corpus import embedded_corpus
from grug_native.tracking.jsonl import RunTracker

WEIGHTS = {"python/code": 0.7, "python/docstrings": 0.15, "english/reference": 0.15}


def run_config(job: Job) -> GrugNativeRunConfig:
    """The run: nothing but training steps on the embedded corpus, documents seeing each other as in the peers."""
    from levanter.data.text.datasets import DatasetComponent

    shape = job.sizes
    data = embedded_corpus(job.corpora, vocab_size=shape.vocab_size, weights=WEIGHTS)
    components: dict[str, Any] = {}
    for name, component in data.components.items():
        assert isinstance(component, DatasetComponent)
        # A flat cache is of one split: there is nothing to evaluate on.
        components[name] = replace(component, cache_dir=f"{data.cache_dir}/{name}/train", flat_cache=True)
    return GrugNativeRunConfig(
        model=ours.model_config(shape, **job.model),
        data=replace(data, components=components, block_cross_document_attention=False),
        optimizer=ours.optimizer_config(),
        trainer=GrugTrainerConfig(
            num_train_steps=ours.NUM_TRAIN_STEPS,
            train_batch_size=shape.batch_size,
            seed=shapes.SEED,
            minutes_per_temporary_checkpoint=None,
        ),
        output_path=f"{job.folder}/fit",
    )


def main() -> None:
    """Trains until the parent has enough."""
    job = Job.read(sys.argv[1])
    gate = ours.open_gate(job.cpu_devices)
    log = RunTracker.log

    def log_and_wait(self: RunTracker, metrics: Mapping[str, Any], *, step: int) -> None:
        log(self, metrics, step=step)
        gate.step_done(metrics["train/loss"], metrics["throughput/duration"] - metrics["throughput/loading_time"])

    with patch.object(RunTracker, "log", log_and_wait):
        GrugRunner(run_config(job)).fit()


if __name__ == "__main__":
    main()
