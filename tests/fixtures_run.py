"""A model, batches and runs small enough for every test."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from experiments.variants.moe import MixtureConfig
from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig
from grug_native.language_model import LanguageModel
from grug_native.model import GrugModelConfig, Transformer
from grug_native.optimizer import AdamWConfig, LionConfig, MuonConfig
from grug_native.schedule import ScheduleConfig

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig
    from levanter.data.text.examples import GrugLmExample

    from tests.faults.runs import ForkServer

SMALL_MODEL = GrugModelConfig(
    vocab_size=300, hidden_dim=32, intermediate_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=32
)

SMALL_MIXTURE = MixtureConfig(
    vocab_size=300,
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=32,
    expert_dim=16,
    shared_dim=24,
    num_experts=4,
    router_z_weight=1e-3,
)


def make_batch(
    seed: int = 0, *, batch: int = 4, seq_len: int = 32, vocab_size: int = 300, packed: bool = False
) -> "GrugLmExample":
    """Random tokens; with `packed`, two documents a row."""
    from levanter.data.text.examples import GrugLmExample
    from levanter.grug.attention import AttentionMask

    tokens = jax.random.randint(jax.random.key(seed), (batch, seq_len), 0, vocab_size)
    mask = AttentionMask.causal()
    if packed:
        first = jnp.arange(seq_len)[None, :] < jnp.arange(3, 3 + batch)[:, None]
        mask = mask.with_segment_ids(jnp.where(first, 0, 1))
    return GrugLmExample(tokens, jnp.ones((batch, seq_len)).at[:, -1].set(0.0), mask)


def llama(params: LanguageModel | None) -> Transformer:
    """The parameters, known to be those of our own model."""
    assert isinstance(params, Transformer)
    return params


@contextmanager
def without_runtime_types() -> Generator[None]:
    """What a user meets, who does not run under the type-checking import hook of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


type MakeRun = Callable[..., GrugNativeRunConfig]


@pytest.fixture
def make_run(small_corpus: "LmDataConfig", tmp_path: Path) -> MakeRun:
    """Makes the config of a run of a few steps in a fresh folder: `make_run(trainer={"seed": 1}, optimizer={...})`."""

    def make(
        *,
        trainer: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        name: str = "run",
        **sections: Any,
    ) -> GrugNativeRunConfig:
        trainer_fields: dict[str, Any] = {"num_train_steps": 8, "train_batch_size": 4} | (trainer or {})
        numbers: dict[str, Any] = {"learning_rate": 1e-2, "warmup": 2} | (optimizer or {})
        schedule = {name: numbers.pop(name) for name in ("shape", "warmup", "decay", "min_lr_ratio") if name in numbers}
        kind = {"adamw": AdamWConfig, "muon": MuonConfig, "lion": LionConfig}[numbers.pop("type", "adamw")]
        parts: dict[str, Any] = {"model": SMALL_MODEL, "data": small_corpus} | sections
        return GrugNativeRunConfig(
            **parts,
            optimizer=kind(schedule=ScheduleConfig(**schedule), **numbers),
            trainer=GrugTrainerConfig(**trainer_fields),
            output_path=str(tmp_path / name),
        )

    return make


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> "ForkServer":
    """Starts processes in which all is imported, for runs of their own."""
    from tests.faults.runs import ForkServer

    return ForkServer(tmp_path_factory.mktemp("server"))
