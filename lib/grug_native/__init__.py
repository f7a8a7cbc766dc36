"""A language-model trainer for JAX that a researcher can hold in one hand: `GrugRunner(config).fit()`."""

from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig, load_config, save_config
from grug_native.eval_config import GrugEvalConfig
from grug_native.mesh import MeshAxes, create_mesh
from grug_native.model import MODEL_PRESETS, GrugModelConfig, GrugRopeConfig, Transformer
from grug_native.optimizer import GrugOptimizer, GrugOptimizerConfig
from grug_native.runner import GrugRunner, run_grug_native
from grug_native.state import GrugTrainState, init_train_state
from grug_native.train import GrugStepConfig, StepMetrics, train_step

__all__ = [
    "MODEL_PRESETS",
    "GrugEvalConfig",
    "GrugModelConfig",
    "GrugNativeRunConfig",
    "GrugOptimizer",
    "GrugOptimizerConfig",
    "GrugRopeConfig",
    "GrugRunner",
    "GrugStepConfig",
    "GrugTrainState",
    "GrugTrainerConfig",
    "MeshAxes",
    "StepMetrics",
    "Transformer",
    "create_mesh",
    "init_train_state",
    "load_config",
    "run_grug_native",
    "save_config",
    "train_step",
]
