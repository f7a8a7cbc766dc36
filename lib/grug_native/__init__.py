"""A language-model trainer for JAX that a researcher can hold in one hand: `GrugRunner(config).fit()`."""

from importlib import import_module
from typing import TYPE_CHECKING

from grug_native.host import light_imports

if TYPE_CHECKING:
    from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig, load_config, save_config
    from grug_native.data.corpus import embedded_corpus, local_text_data
    from grug_native.evaluation.config import GrugEvalConfig, GrugHarnessConfig
    from grug_native.language_model import Aux, FlopsPerToken, LanguageModel, shard_parameters, weight
    from grug_native.levanter_optimizer import LevanterOptimizer
    from grug_native.model import MODEL_PRESETS, GrugModelConfig, Transformer
    from grug_native.muon import per_matrix
    from grug_native.optimizer import AdamWConfig, GroupConfig, GrugOptimizer, LionConfig, MuonConfig
    from grug_native.rotary import GrugRopeConfig
    from grug_native.run_plan import RunPlan
    from grug_native.runner import GrugRunner, run_grug_native
    from grug_native.schedule import ScheduleConfig
    from grug_native.sharding import MeshAxes, create_mesh
    from grug_native.state import GrugTrainState, init_train_state
    from grug_native.train import GrugStepConfig, StepMetrics, train_step

__all__ = [
    "MODEL_PRESETS",
    "AdamWConfig",
    "Aux",
    "FlopsPerToken",
    "GroupConfig",
    "GrugEvalConfig",
    "GrugHarnessConfig",
    "GrugModelConfig",
    "GrugNativeRunConfig",
    "GrugOptimizer",
    "GrugRopeConfig",
    "GrugRunner",
    "GrugStepConfig",
    "GrugTrainState",
    "GrugTrainerConfig",
    "LanguageModel",
    "LevanterOptimizer",
    "LionConfig",
    "MeshAxes",
    "MuonConfig",
    "RunPlan",
    "ScheduleConfig",
    "StepMetrics",
    "Transformer",
    "create_mesh",
    "embedded_corpus",
    "init_train_state",
    "load_config",
    "local_text_data",
    "per_matrix",
    "run_grug_native",
    "save_config",
    "shard_parameters",
    "train_step",
    "weight",
]

_MODULES = {
    "config": ("GrugNativeRunConfig", "GrugTrainerConfig", "load_config", "save_config"),
    "data.corpus": ("embedded_corpus", "local_text_data"),
    "evaluation.config": ("GrugEvalConfig", "GrugHarnessConfig"),
    "sharding": ("MeshAxes", "create_mesh"),
    "language_model": ("Aux", "FlopsPerToken", "LanguageModel", "shard_parameters", "weight"),
    "levanter_optimizer": ("LevanterOptimizer",),
    "model": ("MODEL_PRESETS", "GrugModelConfig", "Transformer"),
    "muon": ("per_matrix",),
    "optimizer": ("AdamWConfig", "GroupConfig", "GrugOptimizer", "LionConfig", "MuonConfig"),
    "schedule": ("ScheduleConfig",),
    "rotary": ("GrugRopeConfig",),
    "run_plan": ("RunPlan",),
    "runner": ("GrugRunner", "run_grug_native"),
    "state": ("GrugTrainState", "init_train_state"),
    "train": ("GrugStepConfig", "StepMetrics", "train_step"),
}


light_imports.install()


def __getattr__(name: str) -> object:
    # Only what is asked for is imported, so that `grug --help` and `grug ckpt ls` need no JAX.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"grug_native.{module}"), name)
    raise AttributeError(f"module 'grug_native' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
