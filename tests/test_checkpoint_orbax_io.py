import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grug_native.checkpoint.digest import read_leaves, verify_files
from grug_native.checkpoint.metadata import (
    CheckpointError,
    CheckpointMismatchError,
    DamagedCheckpointError,
    NoUsableCheckpointError,
    read_metadata,
)
from grug_native.checkpoint.orbax_io import (
    CheckpointIO,
    NonFiniteStateError,
    OrbaxCheckpointIO,
    load_params,
    restore_checkpoint,
)
from grug_native.host.fault_injection import ENV_NAME, InjectedFaultError
from tests.small_state import SmallState, make_metadata, make_state, save_step, state_shape

IO = OrbaxCheckpointIO()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of step 3, to be copied by tests that damage it."""
    folder = tmp_path_factory.mktemp("committed")
    save_step(folder, 3)
    return folder


@pytest.fixture
def folder(committed: Path, tmp_path: Path) -> Path:
    """A copy of the folder with step 3."""
    return Path(shutil.copytree(committed, tmp_path / "checkpoints"))


def test_orbax_io_keeps_the_protocol() -> None:
    assert isinstance(IO, CheckpointIO)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_a_state_comes_back_bit_for_bit(ema: bool, compress: bool, tmp_path: Path) -> None:
    state = make_state(3, ema=ema)
    OrbaxCheckpointIO(compress=compress).save(tmp_path / "step-3", state, metadata=make_metadata(3))()
    restored = restore_checkpoint(tmp_path / "step-3", state_shape(ema=ema))
    assert eqx.tree_equal(restored.state, state)
    assert restored.metadata == read_metadata(tmp_path / "step-3")
    assert jax.random.key_impl(restored.state.training_key) == "threefry2x32"
    assert names(tmp_path) == ["step-3"]


def test_nothing_is_visible_before_the_commit(tmp_path: Path) -> None:
    commit = IO.save(tmp_path / "step-3", make_state(3), metadata=make_metadata(3))
    assert IO.restore_latest(tmp_path, state_shape()) is None
    commit()
    restored = IO.restore_latest(tmp_path, state_shape())
    assert restored is not None and int(restored.state.step) == 3


def test_the_state_may_be_donated_at_once(tmp_path: Path) -> None:
    @jax.jit
    def same_buffers(x: jax.Array) -> jax.Array:
        return x

    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = make_state(3)
    expected = jax.tree.map(jnp.copy, state)
    commit = IO.save(tmp_path / "step-3", state, metadata=make_metadata(3))
    params = state.params
    for _ in range(5):
        params = overwrite(params)
    commit()
    assert float(same_buffers(params.embed)[0, 0]) == -1
    assert eqx.tree_equal(restore_checkpoint(tmp_path / "step-3", state_shape()).state, expected)


def test_the_parameters_load_alone(tmp_path: Path) -> None:
    state = make_state(3, ema=True)
    path = save_step(tmp_path, 3, state=state)
    shape = state_shape(ema=True)
    shutil.rmtree(path / "train")
    assert eqx.tree_equal(load_params(path, shape.params), state.params)
    assert eqx.tree_equal(load_params(path, shape.ema_params, ema=True), state.ema_params)
    with pytest.raises(
        CheckpointMismatchError, match=r"params\.embed: stored float32\[16, 8\], wanted float32\[16, 4\]"
    ):
        load_params(path, state_shape(width=4).params)


def test_missing_moving_averages_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"ema_params\.embed: stored None"):
        load_params(folder / "step-3", state_shape().params, ema=True)


def test_a_reader_needs_no_config(folder: Path) -> None:
    state, leaves = make_state(3), read_leaves(folder / "step-3")
    np.testing.assert_array_equal(leaves["params.embed"], np.asarray(state.params.embed))
    np.testing.assert_array_equal(leaves["training_key"], np.asarray(jax.random.key_data(state.training_key)))
    assert leaves["params.bias"].dtype == jnp.bfloat16
    assert list(read_leaves(folder / "step-3", ["step"])) == ["step"]


def test_plain_orbax_reads_it_too(folder: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    state = make_state(3)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"embed": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)}
    wanted["bias"] = jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding)
    loaded = ocp.load_checkpointables(str(folder / "step-3"), {"params": wanted})["params"]
    assert eqx.tree_equal(loaded, {"embed": state.params.embed, "bias": state.params.bias})


def test_it_moves_between_meshes_bit_for_bit(tmp_path: Path) -> None:
    count = jax.device_count()
    axis_types = (jax.sharding.AxisType.Explicit,) * 2
    wide = jax.make_mesh((1, count), ("data", "model"), axis_types=axis_types)
    tall = jax.make_mesh((count, 1), ("data", "model"), axis_types=axis_types)

    def sharding(leaf: jax.Array | jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec("data", "model") if leaf.ndim == 2 else PartitionSpec())

    def shape_on(mesh: jax.sharding.Mesh) -> SmallState:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding(s, mesh)), state_shape())

    state = make_state(3)
    save_step(tmp_path, 3, state=jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf, wide)), state))
    for shape in (shape_on(tall), shape_on(wide), state_shape()):
        restored = restore_checkpoint(tmp_path / "step-3", shape).state
        assert eqx.tree_equal(jax.device_get(restored.params), jax.device_get(state.params))
        assert eqx.tree_equal(jax.device_get(restored.opt_state), jax.device_get(state.opt_state))
        assert jax.random.key_data(restored.training_key).tolist() == jax.random.key_data(state.training_key).tolist()
        assert shape.params.embed.sharding in (None, restored.params.embed.sharding)


def test_another_shape_is_refused_before_anything_is_read(folder: Path) -> None:
    shutil.rmtree(folder / "step-3" / "params")
    for shape in (state_shape(width=4), state_shape(ema=True)):
        with pytest.raises(CheckpointMismatchError, match="wanted"):
            IO.restore_latest(folder, shape)
    assert names(folder) == ["step-3"]


def test_a_poisoned_state_is_never_committed(tmp_path: Path) -> None:
    poisoned = eqx.tree_at(lambda s: s.params.bias, make_state(3), jnp.full((8,), jnp.nan, jnp.bfloat16))
    with pytest.raises(NonFiniteStateError, match=r"step 3 .*params\.bias"):
        save_step(tmp_path, 3, state=poisoned)
    assert names(tmp_path) == []


def flip_bit(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def test_200_bit_flips_and_none_is_loaded_silently(folder: Path) -> None:
    """Each flip is found, or has provably changed nothing of what is loaded."""
    path, expected = folder / "step-3", make_state(3)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size > 0]
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        file = rng.choice(files)
        position, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        flip_bit(file, position, bit)
        try:
            assert eqx.tree_equal(restore_checkpoint(path, state_shape()).state, expected), f"{file}: {position}, {bit}"
            assert verify_files(path, read_metadata(path)) == []
        except DamagedCheckpointError:
            found += 1
        flip_bit(file, position, bit)
    assert eqx.tree_equal(restore_checkpoint(path, state_shape()).state, expected)
    print(f"{found} of 200 flips were found, the others changed nothing")
    assert found > 20


def test_a_file_that_lacks_its_last_byte_is_found_or_changed_nothing(folder: Path) -> None:
    path, expected, found = folder / "step-3", make_state(3), 0
    for file in [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size > 0]:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        try:
            assert eqx.tree_equal(restore_checkpoint(path, state_shape()).state, expected), str(file)
        except DamagedCheckpointError:
            found += 1
        file.write_bytes(whole)
    assert found > 3


def test_a_shape_that_is_not_the_recorded_one_is_damage(folder: Path) -> None:
    path = folder / "step-3"
    metadata = read_metadata(path)
    embed = replace(metadata.leaves["params.embed"], shape=(1 << 20, 8))
    assert "float32[16, 8] on disk, and float32[1048576, 8] was saved" in "".join(
        verify_files(path, replace(metadata, leaves=dict(metadata.leaves) | {"params.embed": embed}))
    )


def test_flips_in_the_arrays_themselves_are_all_found(folder: Path) -> None:
    path = folder / "step-3"
    embed = np.asarray(make_state(3).params.embed).tobytes()
    (data,) = (path / "params" / "d").iterdir()  # small arrays are inlined in the merged tree's only file
    start = data.read_bytes().index(embed)
    for position in range(start, start + len(embed), 7):
        flip_bit(data, position, position % 8)
        with pytest.raises(DamagedCheckpointError, match=r"params\.embed"):
            restore_checkpoint(path, state_shape())
        flip_bit(data, position, position % 8)


def truncate(path: Path) -> None:
    largest = max(path.glob("train/**/d/*"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated data": truncate,
    "no data": lambda path: shutil.rmtree(path / "params"),
    "no manifest": lambda path: (path / "train" / "manifest.ocdbt").unlink(),
    "empty manifest": lambda path: (path / "params" / "manifest.ocdbt").write_bytes(b""),
    "no metadata": lambda path: (path / "grug_checkpoint.json").unlink(),
    "empty metadata": lambda path: (path / "grug_checkpoint.json").write_bytes(b""),
    "half deleted": lambda path: [shutil.rmtree(path / "train"), (path / "grug_checkpoint.json").unlink()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_one_is_set_aside_and_the_older_one_taken(
    damage: Callable[[Path], object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(save_step(folder, 10))
    (folder / "step-99").mkdir()
    (folder / "step-98").symlink_to("/")
    restored = IO.restore_latest(folder, state_shape())
    assert restored is not None and eqx.tree_equal(restored.state, make_state(3))
    assert names(folder) == [".corrupt-step-10", "step-3", "step-98", "step-99"]
    assert "CHECKPOINT DAMAGED" in caplog.text and "step-10" in caplog.text

    damage(folder / "step-3")
    for _ in range(2):
        with pytest.raises(NoUsableCheckpointError, match="refusing to start from scratch"):
            IO.restore_latest(folder, state_shape())
    assert names(folder) == [".corrupt-step-10", ".corrupt-step-3", "step-98", "step-99"]


@contextmanager
def as_nobody() -> Generator[None]:
    """Root may read everything; others are held back by the mode of a file already."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["grug_checkpoint.json", "params/manifest.ocdbt"])
def test_what_may_not_be_read_is_not_damaged(name: str) -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        folder.chmod(0o755)
        save_step(folder, 3)
        (folder / "step-3" / name).chmod(0)
        with as_nobody(), pytest.raises(CheckpointError, match=name.split("/")[0].split(".")[0]) as caught:
            IO.restore_latest(folder, state_shape())
        assert type(caught.value) is CheckpointError
        assert names(folder) == ["step-3"]


@pytest.mark.parametrize("lost", ["_CHECKPOINT_METADATA", "params/_METADATA", "params/_sharding", "commit_success.txt"])
def test_what_orbax_alone_would_miss_is_not_needed(lost: str, folder: Path) -> None:
    (folder / "step-3" / lost).unlink()
    assert eqx.tree_equal(restore_checkpoint(folder / "step-3", state_shape()).state, make_state(3))


def test_a_renamed_step_is_damage(folder: Path) -> None:
    (folder / "step-3").rename(folder / "step-4")
    with pytest.raises(DamagedCheckpointError, match="holds step 3"):
        restore_checkpoint(folder / "step-4", state_shape())


@pytest.mark.parametrize("fault", ["raise", "enospc", "memory"])
@pytest.mark.parametrize("point", ["mid_write", "pre_commit"])
def test_a_failed_save_leaves_nothing_behind(
    point: str, fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_NAME, f"{fault}@{point}:4")
    with pytest.raises((InjectedFaultError, OSError, MemoryError, CheckpointError), match=f"{fault}@{point}:4"):
        save_step(folder, 4)
    assert names(folder) == ["step-3"]
    monkeypatch.delenv(ENV_NAME)
    save_step(folder, 4)
    assert names(folder) == ["step-3", "step-4"]


def test_a_disk_that_takes_no_more_is_reported(tmp_path: Path) -> None:
    state = eqx.tree_at(lambda s: s.params.embed, make_state(3), jnp.ones((512, 512)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-3 could not be written; its disk has .* File too large"):
            save_step(tmp_path, 3, state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []
