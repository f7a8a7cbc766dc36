"""A run on anyone's text: sizes chosen from how much there is, and from the machine.

On a CPU the run is meant to show something within five minutes on two cores; on an accelerator the model grows with the
text, to about 20 tokens a parameter (Hoffmann et al. 2022, arXiv 2203.15556), counting the times they are seen.
"""

import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import jax

from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig
from grug_native.corpus import local_text_data
from grug_native.documents import find_files, read_documents, suffix
from grug_native.eval_config import GrugEvalConfig
from grug_native.metrics import parameter_counts
from grug_native.model import GrugModelConfig
from grug_native.optimizer import GrugOptimizerConfig
from grug_native.run_place import tokenizer_of

_SMALLEST_DOMAIN = 100_000
"""Bytes. Less text of one kind is no domain of its own: its held-out part would say nothing."""
_SMALLEST_SHARE = 0.05
"""Of all text, likewise."""
_BYTES_PER_TOKEN = 3.2
"""Of a byte-level BPE of a few thousand tokens on English or code."""
_EPOCHS = 4
"""Times that the text is seen at most: more of them add little (Muennighoff et al. 2023, arXiv 2305.16264)."""
_TOKENS_PER_PARAMETER = 20
_CPU_STEPS_PER_CORE = 256
"""About two minutes of the smallest model; compiling, evaluating and making the corpus take another."""
_MOST_CPU_CORES = 16
"""More cores than this do not make so small a model faster."""
_PROMPT_CHARACTERS = 40

# (hidden, intermediate, layers, heads) by size.
_SHAPES = ((128, 448, 4, 4), (256, 896, 6, 8), (384, 1344, 8, 6), (512, 1792, 8, 8), (768, 2688, 12, 12))


def text_run(
    path: Path, *, name: str | None = None, runs: Path = Path("runs"), output_path: str | None = None
) -> GrugNativeRunConfig:
    """Makes a run of the texts in a folder, or finds the corpus that an earlier call made of the same ones.

    Texts of one suffix are a domain, told apart in the evaluation; 5% of each are held out.

    Args:
        path: a folder, or a file.
        name: of the run; by default that of the folder.
        runs: where runs are, and the corpora that they share; texts in there are no texts of the folder.
        output_path: folder of the run, if it is to be another than `runs/NAME`.

    Raises:
        ValueError: if there is no text, too little of it, or a file that cannot be read as text.
    """
    run_folder = Path(output_path or runs / (name or _run_name(path)))
    if run_folder.resolve() == path.resolve():
        raise ValueError(
            f"output_path={str(run_folder)!r} is where the texts are, and what the run writes would be among them: "
            f"give another folder, such as --output_path {runs / _run_name(path)}-run"
        )
    domains = text_domains(path, leave_out=(runs, run_folder))
    sizes = {domain: sum(file.stat().st_size for file in files) for domain, files in domains.items()}
    total = sum(sizes.values())
    if total < _SMALLEST_DOMAIN:
        raise ValueError(
            f"{path} holds {total:,} bytes of text: a model needs some more, {_SMALLEST_DOMAIN:,} at the very least"
        )
    tokens = int(total / _BYTES_PER_TOKEN)
    model = choose_model(tokens, on_cpu=jax.default_backend() == "cpu")
    devices = jax.device_count()
    batch = -(-_batch_tokens() // model.max_seq_len // devices) * devices
    steps = choose_steps(tokens, batch * model.max_seq_len)
    return GrugNativeRunConfig(
        model=model,
        data=local_text_data(
            domains,
            cache_dir=runs / "corpora",
            vocab_size=model.vocab_size,
            weights={domain: size / total for domain, size in sizes.items()},
            keep_tokenizer=tokenizer_of(run_folder),
        ),
        optimizer=GrugOptimizerConfig(learning_rate=3e-3 if model.hidden_dim < 512 else 1e-3, warmup=0.05),
        trainer=GrugTrainerConfig(num_train_steps=steps, train_batch_size=batch, minutes_per_temporary_checkpoint=1.0),
        eval=GrugEvalConfig(
            steps_per_eval=-(-steps // 6),
            max_eval_batches=4,
            sample_prompts=tuple(_beginning(files) for files in domains.values()),
        ),
        output_path=str(run_folder),
    )


def text_domains(path: Path, *, leave_out: Sequence[Path] = ()) -> dict[str, list[Path]]:
    """The text files under a path by kind, as in `{"md": [...], "py": [...]}`; kinds of little text go to the largest.

    Args:
        path: a folder, or a file.
        leave_out: folders in it that are not looked into.

    Raises:
        ValueError: if there are none.
    """
    kinds: dict[str, list[Path]] = {}
    for file in find_files("--text", path, leave_out=leave_out):
        kinds.setdefault(suffix(file).removeprefix("."), []).append(file)
    sizes = {kind: sum(file.stat().st_size for file in files) for kind, files in kinds.items()}
    enough = max(_SMALLEST_DOMAIN, _SMALLEST_SHARE * sum(sizes.values()))
    largest = max(sizes, key=lambda kind: (sizes[kind], kind))
    domains = {kind: files for kind, files in kinds.items() if kind == largest or sizes[kind] >= enough}
    rest = [file for kind, files in kinds.items() if kind not in domains for file in files]
    return domains | {largest: sorted([*domains[largest], *rest])}


def choose_model(tokens: int, *, on_cpu: bool) -> GrugModelConfig:
    """The model for so many tokens of text.

    Args:
        tokens: about how many there are.
        on_cpu: take the smallest shape, which a laptop trains in minutes.
    """
    vocab_size = next(
        size for bound, size in ((300_000, 2048), (10**7, 4096), (10**8, 8192), (2**63, 32_768)) if tokens <= bound
    )
    seq_len = 256 if on_cpu or tokens < 10**7 else 1024

    def shaped(shape: tuple[int, int, int, int]) -> GrugModelConfig:
        hidden, intermediate, layers, heads = shape
        return GrugModelConfig(
            vocab_size=vocab_size,
            hidden_dim=hidden,
            intermediate_dim=intermediate,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            max_seq_len=seq_len,
        )

    smallest, *larger = map(shaped, _SHAPES)
    if on_cpu:
        return smallest
    wanted = _EPOCHS * tokens / _TOKENS_PER_PARAMETER
    return max(
        (m for m in larger if parameter_counts(m)["total"] <= wanted), key=lambda m: m.hidden_dim, default=smallest
    )


def choose_steps(tokens: int, batch_tokens: int) -> int:
    """Steps of a run: the text a few times over, at least 100; on a CPU not more than its cores do in some minutes."""
    wanted = max(100, _EPOCHS * tokens // batch_tokens)
    if jax.default_backend() != "cpu":
        return wanted
    return min(wanted, _CPU_STEPS_PER_CORE * min(len(os.sched_getaffinity(0)), _MOST_CPU_CORES))


def _batch_tokens() -> int:
    """Small batches learn most from so few tokens; an accelerator wants larger ones to be busy."""
    return 2048 if jax.default_backend() == "cpu" else 32_768


def _beginning(files: Sequence[Path]) -> str:
    """How the first text starts, cut between words: something for the model to continue."""
    documents = chain.from_iterable(read_documents(file, "text") for file in files)
    text = next(documents)[:_PROMPT_CHARACTERS]
    return text.rsplit(maxsplit=1)[0] if len(text.split()) > 1 else text


def _run_name(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().stem if path.is_file() else path.resolve().name)
    return name.lstrip("._-")[:128] or "text"
