"""A run on anyone's text: sizes chosen from how much there is, and from the machine.

On a CPU the run is meant to show something within five minutes on two cores; on an accelerator the model grows with the
text, to about 20 tokens a parameter (Hoffmann et al. 2022, arXiv 2203.15556), counting the times they are seen.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jax

from grug_native.bucket.place import read_config_file, read_file
from grug_native.checkpoint.run_place import tokenizer_of
from grug_native.components import check_tokenizer
from grug_native.config import GrugNativeRunConfig, GrugTrainerConfig, config_from_dict, config_to_dict
from grug_native.data.corpus import data_of_files
from grug_native.data.corpus_making import check_place
from grug_native.data.corpus_store import SOURCES_FILE, file_digest
from grug_native.data.documents import find_files, read_documents
from grug_native.data.text_files import FoundFiles, compression, suffix
from grug_native.data.text_survey import Survey, known_survey, take_survey
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.host.run_folder import CONFIG_FILE, is_bucket, run_id_from
from grug_native.launch.text_domains import SMALLEST_DOMAIN, file_stem
from grug_native.launch.text_domains import text_domains as text_domains
from grug_native.metrics import parameter_counts
from grug_native.model import GrugModelConfig
from grug_native.optimizer import AdamWConfig
from grug_native.recommended import recommended_optimizer
from grug_native.schedule import ScheduleConfig
from grug_native.weights.config import InitFrom
from grug_native.weights.init_from import promised_model

_BYTES_PER_TOKEN = 3.2
"""Of a byte-level BPE of a few thousand tokens on English or code."""
_EPOCHS = 4
"""Times that the text is seen at most: more of them add little (Muennighoff et al. 2023, arXiv 2305.16264)."""
_TOKENS_PER_PARAMETER = 20
_CPU_STEPS_PER_CORE = 256
"""About two minutes of the smallest model; compiling, evaluating and making the corpus take another."""
_MOST_CPU_CORES = 16
"""More cores than this do not make so small a model faster."""
_CONTINUED_RATE = 0.1
"""Of AdamW's usual peak rate, for weights that are trained: about where schedules end, and where pretraining is best
continued (Parmar et al. 2024, arXiv 2407.07263). At the full rate they lose much of what they know."""
_PROMPT_CHARACTERS = 40
_AMOUNTS = (10**5, 10**6, 2 * 10**7, 10**8, 2 * 10**8, 10**9, 10**11)
"""Tokens of text, of which each may ask for another model."""

logger = logging.getLogger(__name__)

# (hidden, intermediate, layers, heads) by size.
_SHAPES = ((128, 448, 4, 4), (256, 896, 6, 8), (384, 1344, 8, 6), (512, 1792, 8, 8), (768, 2688, 12, 12))


type Settle = Callable[[dict[str, Any]], GrugNativeRunConfig]
"""Makes a config of its sections, and refuses what cannot be. Where the data are not there yet, `data` is without
`cache_dir`, and without `components` too where not even their names are known; nothing may look for them then."""


def text_run(
    path: Path,
    *,
    name: str | None = None,
    runs: Path = Path("runs"),
    output_path: str | None = None,
    text_key: str = "text",
    tokenizer: str | None = None,
    init_from: InitFrom | None = None,
    settle: Settle | None = None,
) -> GrugNativeRunConfig:
    """Makes a run of the texts in a folder, or finds the corpus that an earlier call made of the same ones.

    Its domains (see `text_domains`) are told apart in the evaluation; 5% of each are held out.

    Args:
        path: a folder, or a file.
        name: of the run; by default that of the folder.
        runs: where runs are, and the corpora that they share; texts in there are no texts of the folder.
        output_path: folder of the run, if it is to be another than `runs/NAME`.
        text_key: field or column of the text, in files that have rows.
        tokenizer: folder with a `tokenizer.json`, or name on the Hugging Face hub, to use in place of a new one.
        init_from: parameters to start with, whose model, and tokenizer if none is given, the run takes.
        settle: makes the config, with what the user has changed in it. It is asked before any text is read, before the
            corpus is made, and at the end.

    Raises:
        ValueError: if there is no text, too little of it, or a file that cannot be read as text.
    """
    settle = settle or _settle
    run_folder = Path(output_path or runs / (run_id_from(file_stem(path.resolve())) if name is None else name))
    if run_folder.resolve() == path.resolve():
        raise ValueError(
            f"output_path={str(run_folder)!r} is where the texts are, and what the run writes would be among them: "
            f"give another folder, such as --output_path {runs / file_stem(path.resolve())}-run"
        )
    # Not `run_folder`, which has lost the second slash of a URL, so that it would pass for a folder.
    written = output_path or str(run_folder)
    start = None if init_from is None else _Start.of(init_from)
    tokenizer = tokenizer or (None if start is None else start.tokenizer)
    known = {} if tokenizer is None else {"tokenizer": tokenizer}
    _check_without_text(written, settle, start, known)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    found = find_files("--text", path, leave_out=(runs, run_folder), text_key=text_key)
    survey = _survey(found.files, text_key, runs / "corpora")
    _say_what_was_read(path, found, survey)
    total = survey.total("bytes")
    if total < SMALLEST_DOMAIN:
        left_out = found.describe_left_out()
        raise ValueError(
            f"{path} holds {total:,} bytes of text: a model needs some more, {SMALLEST_DOMAIN:,} at the very least"
            f"{f'; left out: {left_out}' if left_out else ''}"
        )
    sizes = survey.bytes
    domains = text_domains(path, sizes)
    raw = _sections(int(total / _BYTES_PER_TOKEN), written, start)
    weights = {domain: sum(sizes[file] for file in files) / total for domain, files in domains.items()}
    planned = settle(
        raw | {"data": {"components": {domain: {} for domain in domains}, "train_weights": weights} | known}
    )
    rate = raw["optimizer"]["learning_rate"]
    if start is not None and getattr(planned.optimizer, "learning_rate", None) == rate:
        logger.info(
            "learning rate %.0e: %g of AdamW's usual one, at which trained weights would lose what they know",
            rate,
            _CONTINUED_RATE,
        )
    room = planned.model.max_seq_len // 2
    raw["eval"]["sample_tokens"] = max(1, min(raw["eval"]["sample_tokens"], room))
    raw["eval"]["sample_prompts"] = [_beginning(files, text_key, room - 1) for files in domains.values()]
    data = data_of_files(
        domains,
        cache_dir=runs / "corpora",
        vocab_size=planned.model.vocab_size,
        weights=weights,
        text_key=text_key,
        tokenizer=tokenizer,
        keep_tokenizer=_own_tokenizer(written),
        survey=survey,
    )
    stand_in = GrugNativeRunConfig(
        model=planned.model,
        data=data,
        optimizer=planned.optimizer,
        trainer=planned.trainer,
        output_path=raw["output_path"],
    )
    return settle(raw | {"data": config_to_dict(stand_in)["data"]})


@dataclass(frozen=True)
class _Start:
    """What a run takes from where its first parameters are."""

    init_from: InitFrom
    model: Mapping[str, Any]
    tokenizer: str

    @staticmethod
    def of(init_from: InitFrom) -> "_Start":
        return _Start(init_from, *promised_model(init_from))


@dataclass(frozen=True)
class _NotYet:
    """Stands for the data until they are made."""


def _settle(raw: dict[str, Any]) -> GrugNativeRunConfig:
    return config_from_dict(raw if "cache_dir" in raw["data"] else raw | {"data": _NotYet()})


def _check_without_text(output_path: str, settle: Settle, start: _Start | None, data: Mapping[str, Any]) -> None:
    """Refuses what would be wrong with any amount of text."""
    refusals: list[ValueError] = []
    models: list[Mapping[str, Any]] = []
    for tokens in _AMOUNTS:
        raw = _sections(tokens, output_path, start)
        if raw["model"] in models:
            continue
        models.append(raw["model"])
        try:
            settle(raw | {"data": data})
        except ValueError as error:
            refusals.append(error)
        else:
            return
    raise refusals[0]


def _sections(tokens: int, output_path: str, start: _Start | None) -> dict[str, Any]:
    """The config for so many tokens of text, but for its data."""
    chosen = choose_model(tokens, on_cpu=jax.default_backend() == "cpu")
    model = asdict(chosen) if start is None else dict(start.model)
    seq_len = min(chosen.max_seq_len, model.get("max_seq_len", chosen.max_seq_len))
    devices = jax.device_count()
    batch = -(-_batch_tokens() // seq_len // devices) * devices
    steps = choose_steps(tokens, batch * seq_len)
    return {
        "model": model,
        "optimizer": _optimizer(chosen) if start is None else _continuing(model),
        "trainer": asdict(
            GrugTrainerConfig(
                num_train_steps=steps,
                train_batch_size=batch,
                train_seq_len=None if start is None else seq_len,
                init_from=None if start is None else start.init_from,
                minutes_per_temporary_checkpoint=1.0,
            )
        ),
        "eval": asdict(GrugEvalConfig(steps_per_eval=-(-steps // 6), max_eval_batches=4)),
        "output_path": output_path,
    }


def _optimizer(model: GrugModelConfig) -> dict[str, Any]:
    return {"type": "muon"} | asdict(recommended_optimizer(model.hidden_dim))


def _continuing(model: Mapping[str, Any]) -> dict[str, Any]:
    rate = _CONTINUED_RATE * (3e-3 if model.get("hidden_dim", 0) < 512 else 1e-3)
    return {"type": "adamw"} | asdict(AdamWConfig(learning_rate=rate, schedule=ScheduleConfig(warmup=0.05)))


def _own_tokenizer(output_path: str) -> str | None:
    """The tokenizer of the run that has been started there; None if none has."""
    if not is_bucket(output_path):
        return tokenizer_of(Path(output_path))
    begun = read_file(output_path, CONFIG_FILE) is not None
    return read_config_file(output_path)["data"].get("tokenizer") if begun else None


def _survey(files: Sequence[Path], text_key: str, corpora: Path) -> Survey:
    digests = [file_digest(file) for file in files]
    known = known_survey(sorted(corpora.glob(f"*/{SOURCES_FILE}")), files, digests, text_key)
    if known is not None:
        return known
    check_place(corpora)
    return take_survey(files, digests, text_key)


def _say_what_was_read(path: Path, found: FoundFiles, survey: Survey) -> None:
    kinds: dict[str, list[int]] = {}
    for file, counts in zip(survey.files, survey.counts, strict=True):
        kind = kinds.setdefault(suffix(file) + (file.suffix.lower() if compression(file) else ""), [0, 0, 0])
        for place, count in enumerate((1, counts.documents, counts.bytes)):
            kind[place] += count
    read = "; ".join(
        f"{files:,} {kind} with {documents:,} documents, {size:,} bytes of text"
        for kind, (files, documents, size) in sorted(kinds.items())
    )
    logger.info("%s: read %s", path, read)
    passed = {name: survey.total(name) for name in ("empty", "null", "repeated")}
    if any(passed.values()):
        logger.info("%s: passed over %s", path, ", ".join(f"{count:,} {name}" for name, count in passed.items()))
    if found.left_out:
        logger.info("%s: left out %s", path, found.describe_left_out())


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


def _beginning(files: Sequence[Path], text_key: str, most_bytes: int) -> str:
    """How the first text starts, cut between words: something for the model to continue.

    It has `most_bytes` at most: so many tokens of a byte-level tokenizer, if it knows no more than bytes.
    """
    documents: Iterator[str] = chain.from_iterable(read_documents(file, text_key) for file in files)
    text = next((text.lstrip() for text in documents if text.strip()), "")[:_PROMPT_CHARACTERS]
    text = text.encode()[: max(0, most_bytes)].decode(errors="ignore")
    return text.rsplit(maxsplit=1)[0] if len(text.split()) > 1 else text
