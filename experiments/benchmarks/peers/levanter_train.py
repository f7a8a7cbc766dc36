"""levanter's `train_lm` as its users run it: its Llama, its Adam, its trainer, from the same token cache.

It is held by a tracker, in the last call that a step makes to one (`throughput/loading_time`). By then it
has waited for the step itself. `Turn.calls` is its own `throughput/duration`: without data and hooks, which the times
between the ends of steps hold.

Two settings differ from its defaults, in its favour: activations are kept (`gradient_checkpointing=False`), for no
contender recomputes any; and nothing is saved. The optimizer's numbers are those of the others.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, override

from levanter.checkpoint import CheckpointerConfig
from levanter.main import train_lm
from levanter.models.llama import LlamaConfig
from levanter.optim.config import AdamConfig
from levanter.tracker import Tracker, TrackerConfig
from levanter.trainer import TrainerConfig

from experiments.benchmarks.peers import ours, shapes
from experiments.benchmarks.peers.gate import Gate
from experiments.benchmarks.peers.ours_fit import run_config
from experiments.benchmarks.peers.shapes import Job


class GateTracker(Tracker):
    """Collects a step's metrics, and passes the gate when it is over."""

    name = "gate"

    def __init__(self, gate: Gate):
        """Takes the gate of this worker."""
        self._gate = gate
        self._row: dict[str, Any] = {}

    @override
    def log(self, metrics: Mapping[str, Any], *, step: int | None, commit: bool | None = None) -> None:
        """Takes some of a step's metrics."""
        self._row |= metrics
        if "throughput/loading_time" in metrics:
            self._gate.step_done(self._row["train/loss"], self._row["throughput/duration"])
            self._row = {}

    @override
    def log_hyperparameters(self, hparams: dict[str, Any]) -> None:
        """Nothing to do."""

    @override
    def log_summary(self, metrics: dict[str, Any]) -> None:
        """Nothing to do."""

    @override
    def log_artifact(self, artifact_path: Any, *, name: str | None = None, type: str | None = None) -> None:
        """Nothing to do."""

    @override
    def finish(self) -> None:
        """Nothing to do."""


@TrackerConfig.register_subclass("gate")
@dataclass
class GateTrackerConfig(TrackerConfig):
    """Makes the `GateTracker`."""

    gate: ClassVar[Gate]
    """Where the process waits for its turn."""

    @override
    def init(self, run_id: str | None) -> Tracker:
        """Makes it."""
        return GateTracker(self.gate)


def train_config(job: Job) -> train_lm.TrainLmConfig:
    """The same training as ours, in levanter's words."""
    shape, data = job.sizes, run_config(job).data
    return train_lm.TrainLmConfig(
        data=data,
        model=LlamaConfig(
            max_seq_len=shape.seq_len,
            hidden_dim=shape.hidden_dim,
            intermediate_dim=shape.intermediate_dim,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_heads,
            layer_norm_epsilon=shapes.NORM_EPS,
            gradient_checkpointing=False,
            reference_checkpoint=data.tokenizer,  # its default is on the hub
        ),
        optimizer=AdamConfig(
            learning_rate=shapes.LEARNING_RATE,
            lr_schedule="constant",
            warmup=0,
            weight_decay=shapes.WEIGHT_DECAY,
            weight_decay_modules=["self_attn", "mlp", "lm_head"],
            beta1=shapes.BETAS[0],
            beta2=shapes.BETAS[1],
            epsilon=shapes.EPSILON,
            max_grad_norm=shapes.MAX_GRAD_NORM,
        ),
        trainer=TrainerConfig(
            id="levanter",
            log_dir=Path(job.folder) / "levanter",
            tracker=GateTrackerConfig(),
            train_batch_size=shape.batch_size,
            num_train_steps=ours.NUM_TRAIN_STEPS,
            steps_per_eval=ours.NUM_TRAIN_STEPS,
            checkpointer=CheckpointerConfig(base_path=f"{job.folder}/levanter", save_interval=None, keep=[]),
            require_accelerator=False,
        ),
        data_seed=shapes.SEED,
        initialize_model_from_checkpoint_path=f"{job.folder}/levanter-weights" if job.levanter_weights else None,
    )


def main() -> None:
    """Trains until the parent has enough."""
    GateTrackerConfig.gate = ours.open_gate()
    train_lm.main(train_config(Job.read(sys.argv[1])))


if __name__ == "__main__":
    main()
