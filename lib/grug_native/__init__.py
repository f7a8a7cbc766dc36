"""A language-model trainer for JAX that a researcher can hold in one hand: `GrugRunner(config).fit()`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig, load_config, save_config
    from grug_native.corpus import embedded_corpus, local_text_data
    from grug_native.eval_config import GrugEvalConfig, GrugHarnessConfig
    from grug_native.mesh import MeshAxes, create_mesh
    from grug_native.model import Transformer
    from grug_native.model_config import MODEL_PRESETS, GrugModelConfig
    from grug_native.optimizer import GrugOptimizer, GrugOptimizerConfig
    from grug_native.rotary import GrugRopeConfig
    from grug_native.run_plan import RunPlan
    from grug_native.runner import GrugRunner, run_grug_native
    from grug_native.state import GrugTrainState, init_train_state
    from grug_native.train import GrugStepConfig, StepMetrics, train_step

__all__ = [
    "MODEL_PRESETS",
    "GrugEvalConfig",
    "GrugHarnessConfig",
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
    "RunPlan",
    "StepMetrics",
    "Transformer",
    "create_mesh",
    "embedded_corpus",
    "init_train_state",
    "load_config",
    "local_text_data",
    "run_grug_native",
    "save_config",
    "train_step",
]

_MODULES = {
    "config": ("GrugNativeRunConfig", "GrugTrainerConfig", "load_config", "save_config"),
    "corpus": ("embedded_corpus", "local_text_data"),
    "eval_config": ("GrugEvalConfig", "GrugHarnessConfig"),
    "mesh": ("MeshAxes", "create_mesh"),
    "model": ("Transformer",),
    "model_config": ("MODEL_PRESETS", "GrugModelConfig"),
    "optimizer": ("GrugOptimizer", "GrugOptimizerConfig"),
    "rotary": ("GrugRopeConfig",),
    "run_plan": ("RunPlan",),
    "runner": ("GrugRunner", "run_grug_native"),
    "state": ("GrugTrainState", "init_train_state"),
    "train": ("GrugStepConfig", "StepMetrics", "train_step"),
}


def __getattr__(name: str) -> object:
    # Only what is asked for is imported, so that `grug --help` and `grug ckpt ls` need no JAX.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"grug_native.{module}"), name)
    raise AttributeError(f"module 'grug_native' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
