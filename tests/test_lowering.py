"""What an accelerator is given lowers for it, on a machine that has none: kernels, meshes, batches and layers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from grug_native.attention import AttentionName
from grug_native.evaluation.bits_per_byte import TokenBytes
from grug_native.evaluation.drawing import Sampling, rule_of
from grug_native.evaluation.generate import (
    _extend,  # pyright: ignore[reportPrivateUsage] - it is lowered
    _gathered,  # pyright: ignore[reportPrivateUsage] - it is lowered
    _read_prompts,  # pyright: ignore[reportPrivateUsage] - it is lowered
    _Texts,  # pyright: ignore[reportPrivateUsage] - what is lowered takes it
)
from grug_native.evaluation.perplexity import _position_losses  # pyright: ignore[reportPrivateUsage] - it is lowered
from grug_native.evaluation.scoring import _score_batch  # pyright: ignore[reportPrivateUsage] - it is lowered
from grug_native.kernels.backend import Backend
from grug_native.model import GrugModelConfig, RematName, Transformer
from grug_native.optimizer import AdamWConfig, GrugOptimizer, MuonConfig, OptimizerConfig
from grug_native.sharding import MeshAxes, batch_sharding, create_mesh
from grug_native.state import GrugTrainState, init_train_state
from grug_native.train import GrugStepConfig, lower_train_step
from tests.accelerators import AMPERE, HOPPER, PLATFORM, TPU, pretend
from tests.fixtures_run import SMALL_MODEL, make_batch

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from levanter.data.text.examples import GrugLmExample

SEQ_LEN = 256

MODEL = replace(SMALL_MODEL, hidden_dim=64, max_seq_len=SEQ_LEN)
ADAMW = AdamWConfig()
BF16 = GrugStepConfig(compute_dtype="bfloat16", cross_entropy="blockwise")

MESHES = {
    "one device": (1, MeshAxes()),
    "data": (4, MeshAxes()),
    "data x model": (4, MeshAxes(data=2, model=2)),
    "replicas": (4, MeshAxes(replica_dcn=2, data=2)),
}

KERNELS: list[tuple[Backend, AttentionName]] = [
    (HOPPER, "cudnn"),
    (HOPPER, "reference"),
    (HOPPER, "xla_flash"),
    (AMPERE, "cudnn"),
    (TPU, "tpu_splash"),
    (TPU, "reference"),
    (TPU, "xla_flash"),
]


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with pretend(request.param):
        yield request.param


def mesh_of(name: str) -> "Mesh":
    count, axes = MESHES[name]
    return create_mesh(4, axes, devices=jax.devices()[:count])


@cache
def abstract_batch(mesh: str, packed: bool, window: int | None = None) -> "GrugLmExample":
    batch = make_batch(packed=packed, seq_len=SEQ_LEN)
    batch = replace(batch, attn_mask=replace(batch.attn_mask, sliding_window=window))
    sharding = batch_sharding(mesh_of(mesh))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def abstract_state(model: GrugModelConfig, optimizer: GrugOptimizer, *, ema: bool = False) -> GrugTrainState:
    return eqx.filter_eval_shape(lambda: init_train_state(model, optimizer, key=jax.random.key(0), ema=ema))


def step_text(
    device: Backend,
    model: GrugModelConfig,
    optimizer: OptimizerConfig,
    batch: "GrugLmExample",
    step: GrugStepConfig,
) -> str:
    chosen = GrugOptimizer(optimizer, 10)
    state = abstract_state(model, chosen, ema=step.ema_beta is not None)
    platforms = (PLATFORM[device.name],)
    return lower_train_step(chosen, state, batch, config=step, platforms=platforms).as_text()


def text_of(device: Backend, function: Callable[..., object], *arguments: object) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(PLATFORM[device.name],)).as_text()


KERNEL_CALLS = {"cudnn": "__cudnn$fmha", "tpu_splash": "tpu_custom_call"}


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
@pytest.mark.parametrize("rows", ["packed", "whole"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("device", "attention"),
    KERNELS,
    ids=["hopper-cudnn", "gpu-reference", "gpu-xla_flash", "ampere-cudnn", "tpu-splash", "tpu-reference", "tpu-flash"],
    indirect=["device"],
)
def test_the_train_step_lowers(device: Backend, attention: AttentionName, mesh: str, rows: str, layers: str) -> None:
    model = replace(MODEL, attention=attention, scan_layers=layers == "scanned")
    with jax.set_mesh(mesh_of(mesh)):
        text = step_text(device, model, ADAMW, abstract_batch(mesh, rows == "packed"), BF16)
    assert attention not in KERNEL_CALLS or KERNEL_CALLS[attention] in text
    # With cuDNN's packed layout, a mask stands ready for a batch that does not fit it.
    assert ("stablehlo.case" in text) == (attention == "cudnn" and device == HOPPER and rows == "packed")


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("device", [HOPPER, TPU], ids=["gpu", "tpu"], indirect=True)
def test_all_options_together_lower(device: Backend, window: int | None, remat: RematName) -> None:
    step = replace(BF16, ema_beta=0.9, skip_nonfinite=True, z_loss_weight=1e-4)
    mesh = "data x model"
    with jax.set_mesh(mesh_of(mesh)):
        batch = abstract_batch(mesh, packed=True, window=window)
        assert step_text(device, replace(MODEL, remat=remat), MuonConfig(), batch, step)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("device", [HOPPER, AMPERE, TPU], ids=["hopper", "ampere", "tpu"], indirect=True)
def test_evaluation_and_scorer_lower(device: Backend, mesh: str) -> None:
    def evaluate(params: Transformer, batch: "GrugLmExample", tags: Array) -> object:
        lengths, marks = np.ones(300, np.int32), np.zeros(300, bool)
        table = TokenBytes(lengths, lengths, marks, lengths, marks, bos=-1, eos=0)
        return _position_losses(params, batch, tags, table, jnp.zeros(tags.shape[1], jnp.int32), "bfloat16")

    def score(params: Transformer, ids: Array) -> object:
        return _score_batch(params, ids, ids, ids, "bfloat16")

    with jax.set_mesh(mesh_of(mesh)):
        params = abstract_state(MODEL, GrugOptimizer(ADAMW, 10)).params
        batch = abstract_batch(mesh, packed=True)
        for text in (
            text_of(device, evaluate, params, batch, batch.tokens),
            text_of(device, score, params, batch.tokens),
        ):
            assert KERNEL_CALLS["tpu_splash" if device == TPU else "cudnn"] in text


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("device", [HOPPER, TPU], ids=["gpu", "tpu"], indirect=True)
def test_the_sampler_lowers(device: Backend, mesh: str) -> None:
    rule, knobs = rule_of(Sampling(top_k=5, top_p=0.9)), (jnp.float32(1.0), jnp.float32(0.9))

    def generate(params: Transformer, tokens: Array, *of_texts: Array) -> object:
        texts = _Texts(*of_texts)
        weights = _gathered(params, "bfloat16")
        state, _ = _read_prompts(weights, tokens, texts, knobs, rule=rule, room=64, dtype="bfloat16")
        return _extend(weights, state, texts.most > 0, texts, knobs, rule=rule)

    with jax.set_mesh(mesh_of(mesh)):
        params = abstract_state(MODEL, GrugOptimizer(ADAMW, 10)).params
        tokens = abstract_batch(mesh, packed=False).tokens
        of_texts = [
            jax.ShapeDtypeStruct(tokens.shape[:1], dtype, sharding=batch_sharding(mesh_of(mesh)))
            for dtype in (jnp.int32, jnp.int32, jnp.int32, jnp.uint32)
        ]
        text = text_of(device, generate, params, tokens, *of_texts)
    assert KERNEL_CALLS["tpu_splash" if device == TPU else "cudnn"] in text
