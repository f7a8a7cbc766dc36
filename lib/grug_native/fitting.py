"""`trainer.microbatch_size=auto`: the largest microbatch with which the compiled train step fits into the devices."""

import logging
from collections.abc import Callable, Sequence

import jax

from grug_native.kernels.backend import Backend
from grug_native.kernels.choices import Choice
from grug_native.run_plan import MemoryUse
from grug_native.train import CompiledStep

logger = logging.getLogger(__name__)

_USABLE_MEMORY = 0.92
"""Share of a device's memory for the step; the rest is for prefetched batches, and for what fragments."""


def microbatch_sizes(sequences: int, shards: int) -> list[int]:
    """The sizes that divide a batch and divide over the devices, the largest first."""
    return [size for size in range(sequences, 0, -1) if sequences % size == 0 and size % shards == 0]


def compile_fitting(
    build: Callable[[int], CompiledStep], sizes: Sequence[int], backend: Backend
) -> tuple[CompiledStep, Choice]:
    """Compiles the step for the largest microbatch that fits, which a bisection finds, and says why it is that one.

    Args:
        build: makes and compiles the step for a size; of an accelerator it may itself end with `RESOURCE_EXHAUSTED`.
        sizes: to choose from, the largest first.
        backend: whose memory counts. Where it does not tell, the batch is not divided.

    Raises:
        ValueError: if not even the smallest fits.
    """
    whole, memory = sizes[0], backend.memory
    if memory is None:
        why = f"the batch in one pass: a {backend.name} does not tell how much memory it has"
        return build(whole), Choice("microbatch", str(whole), why)
    room = int(_USABLE_MEMORY * memory)
    fitting: dict[int, tuple[CompiledStep, int]] = {}
    needs: dict[int, str] = {}

    def fits(size: int) -> bool:
        step, need = _try(build, size)
        needs[size] = "more than there is" if need is None else _gib(need)
        if step is not None and need is not None and need <= room:
            fitting[size] = step, need
        return size in fitting

    fitting_from, too_large = len(sizes), 0
    if fits(whole):
        fitting_from = 0
    elif fits(sizes[-1]):
        fitting_from = len(sizes) - 1
        while fitting_from - too_large > 1:
            middle = (fitting_from + too_large) // 2
            fitting_from, too_large = (middle, too_large) if fits(sizes[middle]) else (fitting_from, middle)
    if fitting_from == len(sizes):
        raise ValueError(
            f"trainer.microbatch_size=auto: a step of microbatches of {sizes[-1]} takes {needs[sizes[-1]]} a device, "
            f"and {_gib(room)} may be used: set model.remat=full, shorten trainer.train_seq_len, or split the model "
            "over more devices (trainer.mesh)"
        )
    size = sizes[fitting_from]
    step, need = fitting[size]
    larger = f"; {sizes[too_large]} would take {needs[sizes[too_large]]}" if fitting_from else ""
    choice = Choice("microbatch", str(size), f"a step takes {_gib(need)} of {_gib(room)} a device{larger}")
    logger.info("microbatches of %s: %s", choice.name, choice.reason)
    return step, choice


def memory_use(step: CompiledStep) -> MemoryUse | None:
    """What a compiled step takes on each device; None where the backend does not tell."""
    usage = step.executable.memory_analysis()
    if usage is None:
        return None
    state = usage.argument_size_in_bytes
    fresh = usage.output_size_in_bytes - usage.alias_size_in_bytes
    return MemoryUse(state, usage.temp_size_in_bytes, state + fresh + usage.temp_size_in_bytes)


def _try(build: Callable[[int], CompiledStep], size: int) -> tuple[CompiledStep | None, int | None]:
    try:
        step = build(size)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, None
    use = memory_use(step)
    return step, None if use is None else use.peak


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
