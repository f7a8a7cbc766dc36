"""What a run is going to be, worked out before any of it: sizes, costs, choices, and what is wrong with it.

Nothing is allocated. Unless a compilation or a measurement is asked for, the data are not opened, and the work is that
of tracing the shapes of the train state.
"""

import errno
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

from grug_native.bucket.place import check_place, checkpoints_of
from grug_native.checkpoint.leaves import state_bytes
from grug_native.components import RunParts
from grug_native.data.corpus_store import RECORD_FILE, Counts, read_counts
from grug_native.data.mixture import check_mixture, mixture_stages
from grug_native.fitting import memory_use
from grug_native.host.process import CACHE_VARIABLE, FLAGS_VARIABLE, GPU_FLAGS, TUNABLES_VARIABLE, with_gpu_flags
from grug_native.host.run_folder import is_bucket, local_path
from grug_native.kernels.backend import current_backend
from grug_native.kernels.choices import Choice, noted_choices
from grug_native.language_model import LanguageModel, parameter_kinds
from grug_native.loss import next_token_loss
from grug_native.metrics import flops_per_token, parameter_counts
from grug_native.microbatches import reduce_once
from grug_native.recommended import recommended_in_words
from grug_native.run_plan import MixtureStages, RunPlan, Timing
from grug_native.sharding import batch_shards

_DISK_MARGIN = 0.2
"""In checkpoints, beside the permanent ones and the temporary ones that are kept."""


def build_plan(parts: RunParts, *, compile: bool = False, measure: int = 0) -> RunPlan:
    """Works a run out.

    Args:
        parts: of the run. Its config's data may be a `DataSketch`, if nothing is compiled or measured.
        compile: compile the train step, for its memory.
        measure: train so many steps from the start, on the run's data, for its speed; nothing of it is kept.

    Raises:
        ValueError: for whatever can be known to be wrong: mesh, routing, schedule, vocabulary, batch sizes.
        OSError: if the disk has no room for the checkpoints.
        StoreError: if the run is to be in a bucket that cannot be used.
    """
    config, trainer = parts.config, parts.config.trainer
    model, steps = config.model, config.trainer.num_train_steps
    state = parts.state_shape  # The mesh, the shapes and the routing are checked here.
    vocabulary = _check_vocabulary(config.data.tokenizer, model.vocab_size)
    _check_eval_batch(parts)
    if jax.process_index() == 0:
        check_place(config.output_path)
    saved = checkpoints_of(config.output_path).steps()
    checkpoint_bytes = state_bytes(state)
    needed = _disk_needed(parts, checkpoint_bytes, saved)
    free = _disk_free(config.output_path)
    if free is not None and free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoints still to come need {_bytes(needed)}, and {_bytes(free)} are free: make room, "
            "raise trainer.steps_per_checkpoint, or change output_path",
            str(local_path(config.output_path)),
        )
    flops = flops_per_token(model, config.seq_len)
    tokens = trainer.data_offset(steps) * config.seq_len
    leaves = jax.tree.leaves_with_path(state.params)
    memory = memory_use(parts.compiled_step()) if compile else None
    return RunPlan(
        run_id=config.run_id,
        output_path=config.output_path,
        resumes_from=saved[0] if saved else None,
        starts_with=starting_parameters(parts, resumes=bool(saved)),
        parameters=parameter_counts(model),
        routing=parts.optimizer.routing(state.params),
        learning_rates=_learning_rates(parts),
        recommended=_recommended(state.params),
        flops_per_token=flops,
        total_flops=tokens * flops.full,
        steps=steps,
        tokens=tokens,
        batch_stages=trainer.batch_stages,
        seq_len=config.seq_len,
        mixture=_mixture(parts),
        corpus=corpus_counts(config.data.cache_dir),
        mesh=dict(parts.mesh.shape),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        shardings={
            jax.tree_util.keystr(path): ", ".join(axis or "-" for axis in leaf.sharding.spec) for path, leaf in leaves
        },
        choices=_choices(parts),
        checkpoint_bytes=checkpoint_bytes,
        disk_needed=needed,
        disk_free=free,
        vocabulary=vocabulary,
        memory=memory,
        timing=_measured(parts, measure) if measure > 0 else None,
    )


def starting_parameters(parts: RunParts, *, resumes: bool) -> str | None:
    """Which parameters a start of the run loads in place of drawing them, in words; checks that they fit.

    Raises:
        ValueError: if they do not, or cannot be read.
        DamagedCheckpointError: if they are those of a damaged checkpoint.
    """
    init_from = parts.config.trainer.init_from
    if init_from is not None and resumes:
        return f"its own checkpoint; the parameters of trainer.init_from, {init_from.source}, are not used again"
    return None if parts.initial_parameters is None else parts.initial_parameters.described


def tokenizer_size(tokenizer: str) -> int | None:
    """Tokens of a tokenizer that lies in a local folder; None for one that does not."""
    file = Path(tokenizer) / "tokenizer.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    known = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    return len(known | {token["content"] for token in content.get("added_tokens", ())})


def _check_vocabulary(tokenizer: str, vocab_size: int) -> int | None:
    tokens = tokenizer_size(tokenizer)
    if tokens is not None and tokens > vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is smaller than the {tokens} tokens of the tokenizer {tokenizer!r}: raise "
            f"it to at least {tokens}"
        )
    return tokens


def _check_eval_batch(parts: RunParts) -> None:
    size, shards = parts.eval_batch_size, batch_shards(parts.mesh)
    if size % shards != 0:
        raise ValueError(
            f"eval.eval_batch_size={size} does not divide over {shards} data-parallel devices: use "
            f"{-(-size // shards) * shards}"
        )


def _bytes(size: int) -> str:
    """In the unit in which the size has digits to show."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"


def _disk_needed(parts: RunParts, checkpoint_bytes: int, saved: Sequence[int]) -> int:
    trainer = parts.config.trainer
    every, last = trainer.steps_per_checkpoint, trainer.num_train_steps
    permanent = {last} if every is None else {last, *range(every, last, every)}
    to_come = sum(step > max(saved, default=0) for step in permanent)
    temporary = sum(step not in permanent for step in saved)  # They go as newer ones come.
    spare = max(trainer.keep_last_checkpoints - temporary, 0) + _DISK_MARGIN
    return int((to_come + spare) * checkpoint_bytes) if to_come else 0


def _disk_free(output_path: str) -> int | None:
    if is_bucket(output_path):
        return None
    folder = local_path(output_path)
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _recommended(params: LanguageModel) -> str | None:
    kinds, leaves = jax.tree.leaves(parameter_kinds(params)), jax.tree.leaves(params)
    widths = [leaf.shape[-1] for kind, leaf in zip(kinds, leaves, strict=True) if kind == "embedding"]
    return recommended_in_words(widths[0]) if widths else None


def _learning_rates(parts: RunParts) -> tuple[tuple[int, float], ...]:
    last = parts.config.trainer.num_train_steps - 1
    steps = sorted({0, *(round(last * share) for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9)), last})
    rates = jax.jit(jax.vmap(parts.optimizer.learning_rate))(jnp.array(steps))
    return tuple(zip(steps, rates.tolist(), strict=True))


def _mixture(parts: RunParts) -> MixtureStages:
    data = parts.config.data
    weights = data.train_weights if data.train_weights is not None else dict.fromkeys(data.components, 1.0)
    check_mixture(weights, data.mixture_block_size, parts.config.trainer.data_offset)
    return tuple(
        (step, {name: weight / sum(shares.values()) for name, weight in shares.items()})
        for step, shares in mixture_stages(weights)
    )


def corpus_counts(cache_dir: str | None) -> Counts | None:
    """What a corpus of ours holds, by its token caches; None if they are no corpus of ours."""
    root = Path(cache_dir or "").parent
    return read_counts(root) if cache_dir is not None and (root / RECORD_FILE).is_file() else None


def _choices(parts: RunParts) -> tuple[Choice, ...]:
    config, backend, dtype = parts.config, current_backend(), parts.step_config.compute_dtype
    microbatch = _microbatch(parts)
    asked = config.trainer.compute_dtype != "auto"
    flags = with_gpu_flags(os.environ.get(FLAGS_VARIABLE, "")) if backend.name == "gpu" else ""
    with noted_choices() as made, jax.set_mesh(parts.mesh):
        eqx.filter_eval_shape(
            partial(next_token_loss, compute_dtype=dtype, cross_entropy=config.trainer.cross_entropy),
            parts.state_shape.params,
            parts.batch_shape(int(microbatch.name) if microbatch is not None and microbatch.name.isdigit() else None),
        )
        if microbatch is not None:
            reduce_once(parts.state_shape.params, dtype)
    return (
        *(() if microbatch is None else (microbatch,)),
        *made.values(),
        Choice("compute dtype", dtype, "asked for by the config" if asked else f"the faster one on {backend.name}"),
        *(Choice("XLA flag", flag, reason) for flag, reason in GPU_FLAGS.items() if flag in flags.split()),
        *(
            Choice(variable, os.environ.get(variable) or "not set", reason)
            for variable, reason in (
                (FLAGS_VARIABLE, "the user's, and what a program adds for a GPU"),
                (TUNABLES_VARIABLE, "huge pages make the steps of a CPU a tenth faster; a program sets it"),
                (CACHE_VARIABLE, "what is compiled is kept there; a program sets it"),
            )
        ),
    )


def _microbatch(parts: RunParts) -> Choice | None:
    asked = parts.config.trainer.microbatch_size
    if asked is None:
        return None
    if asked == "auto":
        unknown = Choice("microbatch", "auto", "as many as fit: known once compiled: compile=True, or --compile")
        return parts.fitted.get(parts.largest_batch, unknown)
    return Choice("microbatch", str(asked), f"asked for by the config: {parts.largest_batch // asked} passes a step")


def _measured(parts: RunParts, steps: int) -> Timing:
    from grug_native.data.loader import batch_at

    batches = [batch_at(parts.loader, step) for step in range(min(steps, 8))]
    state = parts.init_state()
    times: list[float] = []
    with jax.set_mesh(parts.mesh):
        for step in range(steps + 1):
            started = time.perf_counter()
            batch = batches[step % len(batches)]
            state, metrics = parts.compiled_step(batch.tokens.shape[0])(state, batch)
            jax.block_until_ready(metrics.loss)
            times.append(time.perf_counter() - started)
    trainer = parts.config.trainer
    step_seconds = statistics.median(times[1:])
    per_second = trainer.batch_size_at(0) * parts.config.seq_len / step_seconds
    return Timing(
        compile_seconds=times[0],
        step_seconds=step_seconds,
        tokens_per_second=per_second,
        train_seconds=trainer.data_offset(trainer.num_train_steps) * parts.config.seq_len / per_second,
    )
