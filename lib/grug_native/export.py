"""A run's parameters for others: a Hugging Face folder, with what is known of them in its `README.md`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.experimental import multihost_utils

from grug_native.bucket.place import fetched
from grug_native.checkpoint.leaves import named_leaves
from grug_native.checkpoint.run_place import placeless
from grug_native.components import RunParts, load_tokenizer
from grug_native.config import config_to_dict
from grug_native.data.corpus_store import describe_counts
from grug_native.data.vocabulary import write_tokenizer
from grug_native.host.process import code_commit
from grug_native.language_model import hf_form
from grug_native.metrics import parameter_counts
from grug_native.plan import corpus_counts
from grug_native.saving import readable_checkpoint
from grug_native.state import GrugTrainState
from grug_native.tracking.jsonl import METRICS_FILE, read_metrics
from grug_native.weights.hf_export import check_output, write_hf_folder
from grug_native.weights.hf_tensors import tensors_of
from grug_native.weights.safetensors_io import DtypeName


def export_checkpoint(
    parts: RunParts,
    output: str | Path,
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: DtypeName = "bfloat16",
) -> Path:
    """Writes the parameters of a checkpoint, one array after the other: no device holds them.

    Args:
        parts: of the run.
        output: a folder that is not there yet.
        step: which checkpoint; None takes the newest.
        ema: take the moving average.
        dtype: of what is written.

    Raises:
        ValueError: the architecture has no form in Hugging Face's libraries; or as `check_output` and
            `readable_checkpoint`.
        DamagedCheckpointError: the checkpoint is damaged.
        OSError: the folder cannot be written.
    """
    hf_form(parts.config.model)
    check_output(output)
    source, metadata = readable_checkpoint(parts, step, ema=ema)
    field = "ema_params" if ema else "params"
    versions = [f"{name} {version}" for name, version in metadata.versions.items()]
    card = _card(parts, metadata.step, ema=ema, dtype=dtype, history=[", ".join(versions), *metadata.lineage])
    return _write(parts, output, lambda leaf: source.read_leaf(f"{field}.{leaf}"), dtype=dtype, card=card)


def export_state(
    parts: RunParts, state: GrugTrainState, output: str | Path, *, ema: bool = False, dtype: DtypeName = "bfloat16"
) -> Path:
    """Writes the parameters of a state, gathered from the devices one array after the other; all processes call it.

    Raises:
        ValueError: the state keeps no moving average, or a parameter is not finite; or as `export_checkpoint`.
        OSError: the folder cannot be written.
    """
    hf_form(parts.config.model)
    if jax.process_index() == 0:
        check_output(output)
    params = state.ema_params if ema else state.params
    if params is None:
        raise ValueError("the run keeps no moving average (trainer.ema_beta is null): take its parameters instead")
    leaves = named_leaves(params)
    commit = code_commit()
    card = _card(parts, int(state.step), ema=ema, dtype=dtype, history=[] if commit is None else [f"commit {commit}"])
    return _write(parts, output, lambda leaf: _gathered(leaves[leaf]), dtype=dtype, card=card)


def _write(
    parts: RunParts, output: str | Path, read: Callable[[str], np.ndarray], *, dtype: DtypeName, card: str
) -> Path:
    path, form = Path(output).absolute(), hf_form(parts.config.model)
    tensors = tensors_of(form, parts.state_shape.params)
    if jax.process_index() == 0:
        ids = {name: getattr(parts.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_hf_folder(
            path,
            {**form.config, **ids},
            tensors,
            read,
            dtype=dtype,
            card=card,
            write_tokenizer=partial(write_tokenizer, load_tokenizer(parts.config.data)),
        )
    else:
        for leaf in tensors:
            read(leaf)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("grug-exported")  # Whoever comes back finds the folder.
    return path


def _gathered(leaf: jax.Array | jax.ShapeDtypeStruct) -> np.ndarray:
    assert isinstance(leaf, jax.Array)
    if not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(jnp.copy(leaf))  # An array keeps what it once gave to the host, and so this one is let go of.


def _card(parts: RunParts, step: int, *, ema: bool, dtype: DtypeName, history: Sequence[str]) -> str:
    config, parameters = parts.config, parameter_counts(parts.config.model)["total"]
    tokens = config.trainer.data_offset(step) * config.seq_len
    raw = placeless(config_to_dict(config))
    known = len(parts.tokenizer)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [grug-native]",
        "---",
        "",
        f"# {config.run_id}",
        "",
        f"A language model of {parameters:,} parameters, {step:,} steps and {tokens:,} tokens old "
        f"({tokens / parameters:.1f} a parameter), trained by grug-native on sequences of {config.seq_len:,} tokens. "
        f"{'These are the moving average of its parameters' if ema else 'These are its parameters'}, in {dtype}.",
    ]
    if config.model.vocab_size > known:
        lines += ["", f"Of its {config.model.vocab_size:,} rows of vocabulary the tokenizer uses {known:,}."]
    lines += ["", "## Data and quality", "", *_domains(parts, step, ema=ema)]
    lines += ["", "## Where it comes from", "", *(f"- {line}" for line in history)]
    return "\n".join([*lines, "", "## Config", "", "```yaml", yaml.safe_dump(raw, sort_keys=False).rstrip(), "```", ""])


def _domains(parts: RunParts, step: int, *, ema: bool) -> Iterator[str]:
    """A table of the domains: what they hold, and the bits per byte of what was held out."""
    data, prefix = parts.config.data, "eval/ema/" if ema else "eval/"
    counts = corpus_counts(data.cache_dir)
    described = {} if counts is None else describe_counts(counts)
    measured, at = _last_evaluation(parts, step, prefix)
    yield "| domain | texts | bits per byte |"
    yield "|---|---|---|"
    for name in data.components:
        value = measured.get(f"{prefix}{name}/bpb_exact")
        yield f"| {name} | {described.get(name, '')} | {'' if value is None else f'{value:.4f}'} |"
    for name, words in (("loss", "nats a token"), ("bpb_exact", "bits per byte")):
        if f"{prefix}{name}" in measured:
            yield f"\nHeld out, of all domains, after {at:,} steps: {measured[f'{prefix}{name}']:.4f} {words}."


def _last_evaluation(parts: RunParts, step: int, prefix: str) -> tuple[Mapping[str, float], int]:
    """What the last evaluation up to a step measured, and after how many steps it was."""
    record = fetched(parts.config.output_path, [METRICS_FILE]) / METRICS_FILE
    for row in reversed(read_metrics(record) if record.is_file() else []):
        if int(row["step"]) <= step and f"{prefix}loss" in row:
            return {name: float(value) for name, value in row.items() if name.startswith(prefix)}, int(row["step"])
    return {}, 0
