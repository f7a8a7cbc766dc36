from dataclasses import replace

import jax
import numpy as np
import pytest

from grug_native.checkpoint.checkpointer import GrugCheckpointer
from grug_native.checkpoint.metadata import CheckpointError, CheckpointMismatchError, read_metadata
from grug_native.components import RunParts
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.host.run_folder import RunLockedError
from grug_native.rotary import GrugRopeConfig
from grug_native.runner import GrugRunner
from grug_native.saving import load_parameters, open_checkpointer
from grug_native.state import GrugTrainState
from tests.fixtures_run import SMALL_MODEL, MakeRun, llama

FEW = GrugEvalConfig(max_eval_batches=1)


def assert_equal(found: GrugTrainState, wanted: GrugTrainState) -> None:
    mine, theirs = (jax.random.key_data(state.training_key) for state in (found, wanted))
    np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.sharding == theirs.sharding
    for mine, theirs in zip(jax.tree.leaves(found.opt_state), jax.tree.leaves(wanted.opt_state), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def parts_of(runner: GrugRunner) -> RunParts:
    return RunParts(runner.config, runner.optimizer)


def test_what_is_saved_by_hand_is_restored_and_goes_on(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run(eval=FEW, trainer={"ema_beta": 0.5}))
    state, _ = runner.train_step(runner.init_state(), runner.batch(0))
    path = runner.save(state)
    assert path.name == "step-1"
    assert runner.save(state) == path
    other = GrugRunner(runner.config)
    restored = other.restore()
    assert_equal(restored, state)
    assert_equal(other.restore(1), state)
    step, params = load_parameters(parts_of(other))
    assert step == 1
    np.testing.assert_array_equal(llama(params).head, llama(state.params).head)
    _, averaged = load_parameters(parts_of(other), 1, ema=True)
    assert state.ema_params is not None
    np.testing.assert_array_equal(llama(averaged).embed, llama(state.ema_params).embed)
    # `fit` resumes from it.
    whole = GrugRunner(make_run(eval=FEW, trainer={"ema_beta": 0.5}, name="whole")).fit()
    assert_equal(other.fit(), whole)


def test_what_is_not_there_or_not_ours_is_refused(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run(eval=FEW))
    with pytest.raises(ValueError, match="holds no checkpoint: train the run first"):
        runner.restore()
    state = runner.init_state()
    runner.save(state)
    with pytest.raises(ValueError, match="no checkpoint of step 5: there are 0"):
        runner.restore(5)
    with pytest.raises(ValueError, match="keeps no moving average"):
        load_parameters(parts_of(runner), ema=True)
    lost = replace(runner.config.data, tokenizer="/nowhere/tokenizer")
    with pytest.raises(ValueError, match=r"data\.tokenizer='/nowhere/tokenizer' is no folder here"):
        load_parameters(parts_of(GrugRunner(replace(runner.config, data=lost))))
    other = GrugRunner(make_run(eval=FEW, trainer={"seed": 3}))
    for use in (other.restore, lambda: other.save(other.init_state())):
        with pytest.raises(CheckpointMismatchError, match=r"trainer\.seed: stored 0, wanted 3"):
            use()
    rope = GrugRopeConfig(theta=5.0)
    turned = make_run(eval=FEW, model=replace(SMALL_MODEL, rope=rope))
    with pytest.raises(CheckpointMismatchError, match=r"model\.rope\.theta"):
        load_parameters(parts_of(GrugRunner(turned)))


def test_what_is_saved_by_hand_knows_what_came_before(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRUG_FAULT", "nan@step:0")
    skipping = {"nonfinite": "skip"}
    GrugRunner(make_run(eval=FEW, trainer=skipping)).fit(stop_after=1)
    monkeypatch.delenv("GRUG_FAULT")
    changed = make_run(eval=FEW, trainer=skipping | {"z_loss_weight": 0.5, "allow_changes": ("trainer.z_loss_weight",)})
    runner = GrugRunner(changed)
    state, _ = runner.train_step(runner.restore(), runner.batch(1))
    metadata = read_metadata(runner.save(state))
    assert (metadata.step, metadata.skipped_steps) == (2, 1)
    assert metadata.lineage == ("step 1: trainer.z_loss_weight: stored 0.0, wanted 0.5",)


def test_saving_an_older_state_or_while_another_writes_is_refused(make_run: MakeRun) -> None:
    runner = GrugRunner(make_run(eval=FEW))
    first = runner.init_state()
    second, _ = runner.train_step(runner.init_state(), runner.batch(0))
    runner.save(second)
    with pytest.raises(CheckpointError, match=r"holds step 1"):
        runner.save(first)
    with open_checkpointer(parts_of(runner)) as held:
        assert isinstance(held, GrugCheckpointer)
        with pytest.raises(RunLockedError, match="is being written to"):
            runner.save(second)
