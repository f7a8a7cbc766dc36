import jax
import pytest

from grug_native.fitting import compile_fitting, memory_use, microbatch_sizes
from grug_native.kernels.backend import Backend
from grug_native.optimizer import AdamWConfig, GrugOptimizer
from grug_native.state import init_train_state
from grug_native.train import CompiledStep, GrugStepConfig, PlainBatch
from tests.fixtures_run import SMALL_MODEL, make_batch

SIZES = [16, 8, 4, 2, 1]
OPTIMIZER = GrugOptimizer(AdamWConfig(), 10)


@pytest.fixture(scope="module")
def steps() -> dict[int, CompiledStep]:
    """The step of a batch of 16, cut into each size."""
    state = init_train_state(SMALL_MODEL, OPTIMIZER, key=jax.random.key(0))
    batch = PlainBatch.of(make_batch(batch=16))

    def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    state, batch = jax.tree.map(abstract, (state, batch))
    return {size: CompiledStep(OPTIMIZER, state, batch, GrugStepConfig(microbatch_size=size)) for size in SIZES}


def peak(step: CompiledStep) -> int:
    use = memory_use(step)
    assert use is not None
    return use.peak


def test_sizes_divide_batch_and_devices() -> None:
    assert microbatch_sizes(24, 4) == [24, 12, 8, 4]


def test_smaller_parts_take_less(steps: dict[int, CompiledStep]) -> None:
    needs = [peak(steps[size]) for size in SIZES]
    assert needs == sorted(needs, reverse=True) and needs[0] > 2 * needs[-1]


@pytest.mark.parametrize("largest", SIZES)
def test_the_largest_that_fits_is_found(steps: dict[int, CompiledStep], largest: int) -> None:
    room = (peak(steps[largest]) + 1) / 0.92
    step, choice = compile_fitting(steps.__getitem__, SIZES, Backend("gpu", memory=int(room) + 1))
    assert step is steps[largest] and choice.name == str(largest)
    assert largest == 16 or f"; {2 * largest} would take " in choice.reason


def test_where_memory_is_not_told_the_batch_is_whole(steps: dict[int, CompiledStep]) -> None:
    step, choice = compile_fitting(steps.__getitem__, SIZES, Backend("cpu"))
    assert step is steps[16] and "does not tell" in choice.reason


def test_a_compiler_that_runs_out_of_memory_says_that_it_does_not_fit(steps: dict[int, CompiledStep]) -> None:
    def compile(size: int) -> CompiledStep:
        if size > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory")
        return steps[size]

    step, choice = compile_fitting(compile, SIZES, Backend("tpu", memory=2**40))
    assert step is steps[4] and "; 8 would take more than there is" in choice.reason


def test_another_error_of_the_compiler_is_raised(steps: dict[int, CompiledStep]) -> None:
    def compile(size: int) -> CompiledStep:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compile_fitting(compile, SIZES, Backend("tpu", memory=2**40))


def test_where_nothing_fits_it_says_what_to_set(steps: dict[int, CompiledStep]) -> None:
    with pytest.raises(ValueError, match=r"microbatches of 1 takes .* 0\.00 GiB may be used: set model\.remat=full"):
        compile_fitting(steps.__getitem__, SIZES, Backend("gpu", memory=1000))
