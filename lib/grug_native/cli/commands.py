"""`grug train | plan | eval | harness | sample | export | plot`: what each does with its arguments.

Each imports what it needs when it is called: levanter alone takes seconds, and a plan does without.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
from rich.console import Console
from rich.table import Table

from grug_native.attention import WANTED_BACKEND
from grug_native.bucket.place import checkpoints_of, fetched, write_file
from grug_native.components import RunParts
from grug_native.config import (
    GrugNativeRunConfig,
    config_from_dict,
    load_config,
    read_config_file,
    with_overrides,
)
from grug_native.data.sketch import DataSketch
from grug_native.host.run_folder import is_bucket
from grug_native.language_model import LanguageModel, abstract_parameters, axis_sizes
from grug_native.parsing.check import check_data, checked, decode
from grug_native.runner import GrugRunner
from grug_native.sharding import MeshAxes
from grug_native.weights.config import InitFrom, spelled_out


def train(arguments: argparse.Namespace) -> None:
    """Trains a run; prints what it came to."""
    from grug_native.launch.job import PROCESS_VARIABLES, initialize_distributed, train_to_results
    from grug_native.launch.summary import print_results
    from grug_native.tracking.progress import configure_logging

    configure_logging()
    if arguments.distributed or not os.environ.keys().isdisjoint(PROCESS_VARIABLES):
        initialize_distributed()
    config = _config_to_train(arguments)
    if arguments.stop_after is not None or arguments.resume_step is not None:
        state = GrugRunner(config).fit(stop_after=arguments.stop_after, resume_step=arguments.resume_step)
        if arguments.stop_after is not None:
            if jax.process_index() == 0:
                print(f"{config.output_path} is at step {int(state.step)} of {config.trainer.num_train_steps}")
            return
    results = train_to_results(config)
    if jax.process_index() == 0:
        print_results(results, config.output_path)


def plan(arguments: argparse.Namespace) -> None:
    """Prints a run's plan."""
    from grug_native.tracking.progress import configure_logging

    raw = with_overrides(read_config_file(arguments.config), arguments.overrides)
    begun = _has_begun(raw)
    if begun:
        configure_logging()
    if not begun and not arguments.compile and not arguments.measure:
        raw = _sketched(raw)
    runner = GrugRunner(config_from_dict(raw))
    Console().print(runner.plan(compile=arguments.compile, measure=arguments.measure))


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluates a checkpoint; prints the metrics."""
    from grug_native.hooks import evaluate_parameters

    parts, step, params = _checkpoint(arguments, load_config(arguments.run))
    metrics = evaluate_parameters(parts, params, ema=arguments.ema)
    Console().print(_metrics_table(f"{parts.config.run_id} after {step} steps", metrics))


def harness(arguments: argparse.Namespace) -> None:
    """Runs tasks on a checkpoint; prints the metrics."""
    from grug_native.evaluation.harness_reports import UnwrittenReportError
    from grug_native.hooks import harness_parameters

    parts, step, params = _checkpoint(arguments, load_config(arguments.run))
    wanted = ("limit", "num_fewshot", "include_path", "batch_size")
    settings = {name: value for name in wanted if (value := getattr(arguments, name)) is not None}
    title = f"{parts.config.run_id} after {step} steps"
    try:
        metrics = harness_parameters(parts, params, step, arguments.tasks, **settings)
    except UnwrittenReportError as error:
        Console().print(_metrics_table(title, error.metrics))
        print(error.report)
        raise
    Console().print(_metrics_table(title, metrics))


def sample(arguments: argparse.Namespace) -> None:
    """Prints texts that a checkpoint continues; between two of them, a line `---`."""
    from grug_native.hooks import sample_parameters

    prompts = [*arguments.prompts, *([] if arguments.prompt_file is None else _lines(arguments.prompt_file))] or [""]
    parts, _, params = _checkpoint(arguments, config_from_dict(_sketched(read_config_file(arguments.run))))
    settings = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    print("\n---\n".join(sample_parameters(parts, params, prompts, **settings)))


def export(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint's parameters as a Hugging Face folder; prints its path."""
    from grug_native.export import export_checkpoint
    from grug_native.tracking.progress import configure_logging

    configure_logging()
    config = _on_these_devices(load_config(arguments.run))
    parts = RunParts(config, GrugRunner(config).optimizer)
    settings = {name: getattr(arguments, name) for name in ("step", "ema", "dtype")}
    print(export_checkpoint(parts, arguments.output, **settings))


def plot(arguments: argparse.Namespace) -> None:
    """Draws the curves of runs into a picture; prints its path."""
    from grug_native.tracking.jsonl import METRICS_FILE
    from grug_native.tracking.plot import PLOT_FILE, plot_runs, write_picture

    folders = [fetched(run, [METRICS_FILE]) if is_bucket(run) else Path(run) for run in arguments.runs]
    path = folders[0] / PLOT_FILE if arguments.output is None else Path(arguments.output)
    if not path.parent.is_dir():
        raise ValueError(f"--output={path}: there is no folder {path.parent}")
    figure = plot_runs(folders)
    try:
        write_picture(figure, path)
    except OSError as error:
        way_out = "give another place, such as --output loss.png"
        raise OSError(error.errno, f"the picture cannot be written ({error.strerror}): {way_out}", str(path)) from error
    if arguments.output is None and is_bucket(arguments.runs[0]):
        write_file(arguments.runs[0], PLOT_FILE, path.read_bytes())
        path = f"{arguments.runs[0].rstrip('/')}/{PLOT_FILE}"
    print(path)


def _config_to_train(arguments: argparse.Namespace) -> GrugNativeRunConfig:
    overrides = list(arguments.overrides)
    if arguments.profile is not None:
        overrides.append(("trainer.profile", arguments.profile))
    if arguments.init_from is not None:
        overrides.insert(0, ("trainer.init_from", json.dumps({"source": arguments.init_from})))
    if arguments.text is None:
        if arguments.text_key is not None:
            raise ValueError(
                f"--text_key={arguments.text_key} goes with --text: the data of a config are there already"
            )
        if arguments.name is not None:
            raise ValueError(
                f"--name={arguments.name} goes with --text: with --config_path, give --output_path runs/NAME"
            )
        raw = read_config_file(arguments.config_path)
        if arguments.output_path is not None:
            raw = with_overrides(raw, [("output_path", arguments.output_path)])
            # Another folder is another run, under a name of its own.
            if is_bucket(arguments.config_path) or Path(arguments.config_path).is_dir():
                raw = with_overrides(raw, [("trainer.run_id", "null")])
        return config_from_dict(with_overrides(raw, overrides))
    from grug_native.launch.text_run import text_run

    return text_run(
        Path(arguments.text),
        name=arguments.name,
        output_path=arguments.output_path,
        text_key=arguments.text_key or "text",
        tokenizer=dict(overrides).get("data.tokenizer"),
        init_from=_init_from(overrides),
        settle=partial(_settle, overrides, arguments),
    )


def _init_from(overrides: Sequence[tuple[str, str]]) -> InitFrom | None:
    own = [(name, value) for name, value in overrides if name.startswith("trainer.init_from")]
    raw = spelled_out(with_overrides({"trainer": {}}, own))["trainer"].get("init_from")
    prefix = "trainer.init_from."
    return None if raw is None else decode(InitFrom, checked(InitFrom, raw, prefix), prefix)


def _settle(
    overrides: Sequence[tuple[str, str]], arguments: argparse.Namespace, raw: dict[str, Any]
) -> GrugNativeRunConfig:
    """Makes the config of a run on text; what can be known to be wrong with it, is found before there are data."""
    from grug_native.plan import build_plan
    from grug_native.resume import check_steps

    changed, data = with_overrides(raw, overrides), raw["data"]
    if "cache_dir" in data:
        return config_from_dict(changed)
    given = changed["data"]
    if "components" not in data:
        # Weights name the domains, which are not known yet.
        given = {key: value for key, value in given.items() if key not in ("components", "train_weights")}
        given["components"] = {"text": {}}
    check_data(given)
    config = config_from_dict(changed | {"data": DataSketch.of({"tokenizer": os.devnull} | given)})
    check_steps(config, stop_after=arguments.stop_after, resume_step=arguments.resume_step)
    # Not the runner's plan: it would compare a run that has begun with data that are only sketched.
    build_plan(RunParts(config, GrugRunner(config).optimizer))
    return config


def _has_begun(raw: Mapping[str, Any]) -> bool:
    """Whether the run has checkpoints, so that its data have to be those; sound or not."""
    checkpoints = checkpoints_of(str(raw.get("output_path")))
    return bool(checkpoints.steps() or checkpoints.damaged())


def _lines(file: str) -> list[str]:
    """The lines of a file of prompts that are not blank."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt_file={file} cannot be read as UTF-8 text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompt_file={file} has no prompts: write one on each line")
    return prompts


def _sketched(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config for what does not open the data, and then has no need of levanter."""
    data = raw.get("data")
    if not isinstance(data, Mapping):
        return dict(raw)
    check_data(cast(Mapping[str, Any], data))
    return {**raw, "data": DataSketch.of(cast(Mapping[str, Any], data))}


def _checkpoint(arguments: argparse.Namespace, config: GrugNativeRunConfig) -> tuple[RunParts, int, LanguageModel]:
    """A run's parts, and what one of its checkpoints holds; folder and devices may be others than it trained with."""
    from grug_native.saving import load_parameters
    from grug_native.tracking.progress import configure_logging

    configure_logging()
    config = _on_these_devices(config)
    parts = RunParts(config, GrugRunner(config).optimizer)
    return parts, *load_parameters(parts, arguments.step, ema=arguments.ema)


def _on_these_devices(config: GrugNativeRunConfig) -> GrugNativeRunConfig:
    """Fits mesh, batches and kernel of a run to the devices at hand: parameters can be restored onto any mesh."""
    trainer, evaluation, harness = config.trainer, config.eval, config.eval.harness
    devices, asked = jax.device_count(), trainer.mesh.model
    model = asked if asked > 0 and devices % asked == 0 else 1
    shards = devices // model
    data = math.gcd(*axis_sizes(abstract_parameters(config.model), "data"), shards)

    def rounded_up(size: int) -> int:
        return -(-size // shards) * shards

    if harness is not None and harness.batch_size is not None:
        harness = replace(harness, batch_size=rounded_up(harness.batch_size))
    batch = rounded_up(evaluation.eval_batch_size or trainer.batch_size_at(0))
    mesh = MeshAxes(replica_dcn=shards // data, data=data, model=model)
    backend = jax.default_backend()
    # A kernel that a model of ours, or one built like it, was told to take and that is not to be had here.
    elsewhere = WANTED_BACKEND.get(getattr(config.model, "attention", "auto"), backend) != backend
    return replace(
        config,
        model=replace(cast(Any, config.model), attention="auto") if elsewhere else config.model,
        trainer=replace(trainer, mesh=mesh, train_batch_size=batch),
        eval=replace(evaluation, eval_batch_size=batch, harness=harness),
    )


def _metrics_table(title: str, metrics: Mapping[str, float]) -> Table:
    table = Table("metric", "value", title=title)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    return table
