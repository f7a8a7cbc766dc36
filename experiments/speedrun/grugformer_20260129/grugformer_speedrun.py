"""The grugformer speedrun: `python -m experiments.speedrun.grugformer_20260129.grugformer_speedrun [--size SIZE]`.

`tiny` trains on what every Python carries (its library, docstrings and language reference), on a laptop's CPU,
offline, in a few minutes. The real sizes train on FineWeb-Edu with the Llama 3 vocabulary, 20 tokens per parameter.
`--executor` runs the same as a step of Marin's executor. To try something else, copy this file and change it.
"""

from grug_native.host.process import end_at_ctrl_c, prepare_process

if __name__ == "__main__":
    end_at_ctrl_c()
    prepare_process()  # It starts the program again: before anything heavy is imported.

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from grug_native import (
    MODEL_PRESETS,
    GrugEvalConfig,
    GrugNativeRunConfig,
    GrugTrainerConfig,
)
from grug_native.launch.exit_codes import explained_exit
from grug_native.launch.job import train_to_results
from grug_native.metrics import flops_per_token, parameter_counts
from grug_native.recommended import recommended_optimizer
from grug_native.components import load_tokenizer
from grug_native.tracking.progress import configure_logging
from grug_native.launch.summary import print_results
from grug_native.checkpoint.run_place import tokenizer_of

if TYPE_CHECKING:
    from fray.types import ResourceConfig
    from levanter.data.text.datasets import LmDataConfig
    from marin.execution.lazy import ArtifactStep

    from grug_native.launch.marin import GrugRun

TOKENS_PER_PARAMETER = 20
"""Training tokens of the real sizes, per weight of the model (Hoffmann et al. 2022, arXiv 2203.15556)."""

LLAMA3_TOKENIZER = "marin-community/marin-tokenizer"
"""Llama 3's vocabulary, 128,256 tokens, under a name that asks for no account."""

HUB_DATASETS = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "dclm": ("mlfoundations/dclm-baseline-1.0", None),
}
"""Name -> id and subset on the Hugging Face hub."""

DEFAULT_TOKENS = 10_000_000_000
"""Of FineWeb-Edu's sample, as its name says: the larger sizes see it more than once, or want `--data` of their own."""

PRETOKENIZED = {"fineweb-edu": "marin-community/fineweb-edu-pretokenized-10B"}
"""Name -> a token cache on the hub, made with `LLAMA3_TOKENIZER`, which the executor downloads whole."""

SIZES = tuple(MODEL_PRESETS)


def build_run(
    size: str = "tiny",
    *,
    data: "LmDataConfig | None" = None,
    output_path: str | None = None,
    num_train_steps: int | None = None,
) -> GrugNativeRunConfig:
    """The run of one size.

    Args:
        size: one of `SIZES`.
        data: what to train on; by default `local_data` for `tiny`, and FineWeb-Edu for the others.
        output_path: folder of the run; by default `runs/grugformer-SIZE`.
        num_train_steps: for a shorter run than the size asks for; the schedule ends there.

    Raises:
        ValueError: if there is no such size.
    """
    if size not in MODEL_PRESETS:
        raise ValueError(f"size={size!r} is unknown: choose one of {', '.join(SIZES)}")
    model = MODEL_PRESETS[size]
    optimizer = recommended_optimizer(model.hidden_dim)
    output_path = output_path or f"runs/grugformer-{size}"
    steps = num_train_steps
    if size == "tiny":
        return GrugNativeRunConfig(
            model=model,
            data=data or local_data("runs/corpora", output_path=output_path),
            optimizer=optimizer,
            trainer=GrugTrainerConfig(num_train_steps=340 if steps is None else steps, train_batch_size=16),
            eval=GrugEvalConfig(
                steps_per_eval=85, max_eval_batches=8, sample_prompts=("def main(", "The value of"), sample_tokens=48
            ),
            output_path=output_path,
        )
    batch, seq_len = 128, 2048
    if steps is None:
        steps = TOKENS_PER_PARAMETER * parameter_counts(model)["total"] // (batch * seq_len)
    return GrugNativeRunConfig(
        model=model,
        data=data or hub_data("fineweb-edu", "runs/caches"),
        optimizer=optimizer,
        trainer=GrugTrainerConfig(
            num_train_steps=steps,
            train_batch_size=batch,
            train_seq_len=seq_len,
            steps_per_checkpoint=5000,
        ),
        eval=GrugEvalConfig(steps_per_eval=500),
        output_path=output_path,
    )


def local_data(cache_dir: str, *, output_path: str | None = None) -> "LmDataConfig":
    """What every Python carries, as training data; made under `cache_dir` on the first call.

    Args:
        cache_dir: where corpora are kept.
        output_path: folder of the run; one that has been started keeps its tokenizer.
    """
    from grug_native.data.corpus import embedded_corpus

    kept = None if output_path is None else tokenizer_of(Path(output_path))
    return embedded_corpus(cache_dir, vocab_size=MODEL_PRESETS["tiny"].vocab_size, keep_tokenizer=kept)


def hub_data(name: str, cache_dir: str) -> "LmDataConfig":
    """A dataset of the Hugging Face hub, streamed and tokenized into `cache_dir` when the run starts.

    1024 sequences are held out of the training split.

    Args:
        name: one of `HUB_DATASETS`, or an id such as `roneneldan/TinyStories`, whose column `text` is taken.
        cache_dir: where token caches are kept.

    Raises:
        ValueError: if that is neither.
    """
    from levanter.data.text.datasets import DatasetComponent, HfDatasetSourceConfig, LmDataConfig

    dataset, subset = _on_the_hub(name)
    label = name.rsplit("/", 1)[-1]
    source = HfDatasetSourceConfig(id=dataset, name=subset, splits=["train"])
    return LmDataConfig(
        components={label: DatasetComponent(source=source)},
        train_weights={label: 1.0},
        num_validation_sequences={label: 1024},
        tokenizer=LLAMA3_TOKENIZER,
        cache_dir=cache_dir,
    )


def _on_the_hub(name: str) -> tuple[str, str | None]:
    if name in HUB_DATASETS:
        return HUB_DATASETS[name]
    if Path(name).exists():
        raise ValueError(f"--data={name!r} is no folder, but a file: give the folder that holds the texts")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(
            f"--data={name!r} is no folder here, and no dataset's id A/B on the Hugging Face hub: give a folder of "
            f"text, local, {', '.join(HUB_DATASETS)}, or such an id"
        )
    return name, None


def _check_hub(name: str) -> None:
    """Finds out whether the hub can be reached, before anything is downloaded; a folder may have been meant."""
    data = hub_data(name, "")
    try:
        load_tokenizer(data)
    except ValueError as error:
        raise ValueError(
            f"--data={name!r} is no folder here, and so a dataset on the Hugging Face hub: if a folder was meant, "
            f"there is none of this name. Else: {error}"
        ) from error


def _default_data(size: str) -> str:
    return "local" if size == "tiny" else "fineweb-edu"


def _is_local(data: str) -> bool:
    return data == "local" or Path(data).is_dir()


def choose_data(name: str, *, output_path: str | None = None) -> "LmDataConfig":
    """The training data that `--data` names.

    Args:
        name: `local`, one of `HUB_DATASETS`, a dataset's id on the Hugging Face hub, or a folder of text files.
        output_path: folder of the run; like `runs`, it is not searched for text.

    Raises:
        ValueError: if it is none of these, or there is no text in the folder.
    """
    if name == "local":
        return local_data("runs/corpora", output_path=output_path)
    if Path(name).is_dir():
        from grug_native.data.corpus import local_text_data
        from grug_native.data.documents import find_files

        files = find_files("--data", name, leave_out=[Path("runs"), Path(output_path or "runs")]).files
        kept = None if output_path is None else tokenizer_of(Path(output_path))
        return local_text_data({"text": files}, cache_dir="runs/corpora", keep_tokenizer=kept)
    return hub_data(name, "runs/caches")


def resources(size: str) -> "ResourceConfig":
    """What a run of one size asks a cluster for: TPUs if the environment says `SR_USE_TPU=1`, else GPUs."""
    from fray.types import ResourceConfig

    if size == "tiny":
        return ResourceConfig.with_cpu(cpu=2, ram="4g", disk="4g")
    if os.environ.get("SR_USE_TPU", "0") == "1":
        return ResourceConfig.with_tpu("v5p-8")
    return ResourceConfig.with_gpu("H100", count={"130m": 1, "300m": 1, "520m": 2, "1_2b": 8}[size])


def build_step(
    size: str, *, data: str = "", num_train_steps: int | None = None, version: str = "dev"
) -> "ArtifactStep[GrugRun]":
    """The run of one size as a step of Marin's executor, with its tokenized data as a step before it.

    Args:
        size: one of `SIZES`.
        data: as in `choose_data`; by default as in `build_run`.
        num_train_steps: as in `build_run`.
        version: `dev` resumes and is the user's own; `YYYY.MM.DD` is made once and then served.
    """
    from marin.execution.lazy import StepContext
    from marin.experiment.data import mixture, pretokenized, tokenized

    from grug_native.launch.marin import corpus_data, corpus_step, training_step

    data = data or _default_data(size)
    name = f"speedrun/grugformer-{size}-{data.strip('/').replace('/', '-')}"
    if _is_local(data):
        paths = None if data == "local" else {"text": str(Path(data).resolve())}
        label = "python" if paths is None else data.strip("/").replace("/", "-")
        vocab_size = MODEL_PRESETS["tiny"].vocab_size
        corpus = corpus_step(f"corpora/{label}", vocab_size=vocab_size, paths=paths, version=version)

        def build_local(ctx: StepContext) -> GrugNativeRunConfig:
            config = corpus_data(ctx, corpus)
            return build_run(size, data=config, output_path=ctx.output_path, num_train_steps=num_train_steps)

        return training_step(name, build_local, deps=(corpus,), version=version, resources=resources(size))
    dataset, _ = _on_the_hub(data)
    if data in PRETOKENIZED:
        cache = pretokenized(
            f"tokenized/{data}", repo_id=PRETOKENIZED[data], tokenizer=LLAMA3_TOKENIZER, version=version
        )
    else:
        cache = tokenized(f"tokenized/{data}", source=dataset, tokenizer=LLAMA3_TOKENIZER, version=version)

    def build(ctx: StepContext) -> GrugNativeRunConfig:
        config = replace(mixture(ctx, {cache: 1.0}), num_validation_sequences={cache.name: 1024})
        return build_run(size, data=config, output_path=ctx.output_path, num_train_steps=num_train_steps)

    return training_step(name, build, deps=(cache,), version=version, resources=resources(size))


def print_run_info(size: str, *, num_train_steps: int | None = None) -> None:
    """Prints what the run of one size will do; no device is used, and no data are looked at."""
    from levanter.data.text.datasets import LmDataConfig

    config = build_run(size, data=LmDataConfig(), num_train_steps=num_train_steps)
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, config.seq_len)
    steps = config.trainer.num_train_steps
    tokens = config.trainer.data_offset(steps) * config.seq_len
    table = Table(title=f"grugformer {size}", show_header=False, title_justify="left")
    table.add_row("parameters", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    table.add_row("tokens", f"{tokens:,} ({tokens / counts['total']:.1f} per parameter)")
    table.add_row("steps", f"{steps:,} of {config.trainer.batch_size_at(0)} sequences of {config.seq_len} tokens")
    table.add_row("model FLOPs", f"{tokens * flops.full:.3e} (attention counted causally: {tokens * flops.causal:.3e})")
    if size != "tiny":
        epochs = tokens / DEFAULT_TOKENS
        table.add_row("epochs", f"{epochs:.1f} of the default data, which hold about {DEFAULT_TOKENS:.0e} tokens")
        asked = resources(size)
        peak = asked.total_flops()
        hours = tokens * flops.full / peak / 3600
        what = f"{asked.chip_count()} chip(s) of {asked.device.variant}"
        table.add_row("device FLOP/s", f"{peak:.3e} on {what}: {hours / 0.4:,.1f} h at 40% of it")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the size that the command line asks for, from wherever its run is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", metavar="SIZE", help=f"{', '.join(SIZES)} (default: tiny)")
    parser.add_argument(
        "--data", default="", help=f"local, {', '.join(HUB_DATASETS)}, a hub id, or a folder of text (default: by size)"
    )
    parser.add_argument("--steps", type=int, help="fewer steps than the size asks for")
    parser.add_argument("--output-path", help="folder of the run (default: runs/grugformer-SIZE)")
    parser.add_argument("--plan", action="store_true", help="print what the run would do, and stop")
    parser.add_argument("--executor", action="store_true", help="run as a step of Marin's executor")
    parser.add_argument("--version", help="with --executor: dev, or YYYY.MM.DD (default: dev)")
    parser.add_argument("--cluster", help="with --executor: address of an Iris controller, http://HOST:PORT")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    configure_logging()
    with explained_exit("grugformer_speedrun", debug=arguments.debug):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    size, steps = arguments.size, arguments.steps
    if steps is not None and steps < 1:
        raise ValueError(f"--steps={steps} must be at least 1; --plan is to look without training")
    executor_only = [name for name in ("version", "cluster") if getattr(arguments, name) is not None]
    if executor_only and not arguments.executor:
        raise ValueError(f"--{executor_only[0]} goes with --executor: add it, or leave this out")
    if arguments.output_path is not None and arguments.executor:
        raise ValueError("--output-path goes without --executor, whose runs lie under MARIN_PREFIX (by default ./runs)")
    print_run_info(size, num_train_steps=steps)
    if arguments.plan:
        return
    if arguments.executor:
        from grug_native.launch.marin import run_steps

        step = build_step(size, data=arguments.data, num_train_steps=steps, version=arguments.version or "dev")
        data = arguments.data or _default_data(size)
        if arguments.cluster is None and not _is_local(data):
            _check_hub(data)  # Before marin downloads what was made with it.
        run = run_steps(step, cluster=arguments.cluster)
        print_results(run.results(), run.path)
        return
    output_path = arguments.output_path or f"runs/grugformer-{size}"
    data = choose_data(arguments.data, output_path=output_path) if arguments.data else None
    if arguments.data and not _is_local(arguments.data):
        _check_hub(arguments.data)
    config = build_run(size, data=data, output_path=arguments.output_path, num_train_steps=steps)
    print_results(train_to_results(config), config.output_path)


if __name__ == "__main__":
    main()
