"""The configuration of a run: plain frozen data, its cross-checks, and YAML in and out."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, override

import draccus
import equinox as eqx
import yaml

from grug_native.bucket.place import files_of, read_config_file, recorded_config
from grug_native.checkpoint.run_place import at_absolute_paths, recorded_name
from grug_native.evaluation.config import GrugEvalConfig
from grug_native.host.run_folder import CONFIG_FILE, fsync, is_bucket, validate_run_id
from grug_native.language_model import ModelConfig
from grug_native.loss import CrossEntropyName
from grug_native.microbatches import check_microbatch_size
from grug_native.optimizer import OptimizerConfig
from grug_native.parsing.check import check_data, checked, decode, no_mapping
from grug_native.parsing.named_types import decode_named, encode_named
from grug_native.parsing.old_configs import upgraded
from grug_native.parsing.overrides import overridden
from grug_native.sharding import MeshAxes
from grug_native.tracking.profile import profile_window
from grug_native.types import check_seed
from grug_native.weights.config import InitFrom, spelled_out

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig
    from levanter.tracker import TrackerConfig
else:  # Importing levanter takes seconds, and a config is made and printed without it.
    LmDataConfig = Any
    TrackerConfig = Any

NonFinitePolicy = Literal["stop", "skip"]
"""What a step whose loss, gradient or update is not finite does to the run."""

ComputeDtypeName = Literal["auto", "float32", "bfloat16"]
"""Dtype of the forward and backward pass; `auto` is bfloat16 on GPU and TPU, and float32 on CPU, where bf16 is slow."""


@dataclass(frozen=True, kw_only=True)
class GrugTrainerConfig:
    """How long, how much at a time, and what happens between the steps."""

    num_train_steps: int
    """Updates of the whole run; the learning-rate schedule ends there."""
    train_batch_size: int | tuple[tuple[int, int], ...]
    """Sequences per step over all devices; or a schedule, pairs of (first step, sequences), the first at step 0."""
    microbatch_size: int | Literal["auto"] | None = None
    """Sequences, over all devices, of one forward and backward pass, where a batch takes more memory than there is: a
    step is the update of the whole batch all the same. `auto`: as many as fit; null: the batch in one pass."""
    train_seq_len: int | None = None
    """Tokens of a sequence; None means `model.max_seq_len`."""
    seed: int = 0
    """Seed of the initial parameters."""
    init_from: InitFrom | None = None
    """Parameters to start with in place of fresh ones, by `source` (or text, which is that) and its other fields; used
    where the run has no checkpoint yet. None draws them."""
    data_seed: int | None = None
    """Seed of the shuffling and of the mixture's order; None means `seed`."""
    ema_beta: float | None = None
    """Decay per step of the parameters' moving average; None keeps none."""
    z_loss_weight: float = 0.0
    """Weight of the squared log-partition in the loss."""
    compute_dtype: ComputeDtypeName = "auto"
    """Dtype of the forward and backward pass; parameters and optimizer state are f32."""
    cross_entropy: CrossEntropyName = "auto"
    """Cross-entropy kernel, by name."""
    mesh: MeshAxes = MeshAxes()
    """Sizes of the mesh axes, in devices."""
    log_every: int = 1
    """Steps from one logged step to the next."""
    watch_every: int | None = None
    """Steps from one that logs norms of each layer's gradients, parameters and updates to the next; None logs none."""
    prefetch: int = 4
    """Batches kept ready on the devices."""
    steps_per_checkpoint: int | None = None
    """Steps from one permanent checkpoint to the next; None keeps only the one at the end."""
    minutes_per_temporary_checkpoint: float | None = 10.0
    """Minutes from any checkpoint to the next temporary one; None makes none. Temporary ones go when there are newer
    ones, permanent ones stay."""
    keep_last_checkpoints: int = 2
    """The newest so many checkpoints are kept whatever their kind: should the last be damaged, there is another."""
    nonfinite: NonFinitePolicy = "stop"
    """`stop` ends the run before anything is saved; `skip` leaves the state as it was and goes on."""
    max_skipped_steps: int = 10
    """With `skip`: so many skipped steps are borne over the whole run, however often it resumes; one more stops it."""
    allow_changes: tuple[str, ...] = ()
    """Dotted fields, or whole sections, that may differ from the checkpoint this once, though they change the results;
    each change is recorded in the checkpoints that follow."""
    profile: str | None = None
    """`START:STEPS`: so many steps are traced, from step START on, into `profile/step-START`; None traces none."""
    temporary_root: str | None = None
    """Of a run in a bucket: URL under which its temporary checkpoints go, such as one whose objects a rule deletes
    after some days; None puts them beside the permanent ones."""
    store_patience_minutes: float = 30.0
    """Of a run in a bucket: minutes for which a save is tried again while the bucket is in trouble."""
    store_lease_seconds: float = 60.0
    """Of a run in a bucket: seconds without a sign of life after which another process may take the run."""
    run_id: str | None = None
    """Name of the run, in checkpoints and trackers; None means the last part of `output_path`."""
    trackers: tuple[TrackerConfig, ...] = ()
    """levanter's tracker configs (wandb, tensorboard, ...); `metrics.jsonl` is written in any case."""

    def __post_init__(self) -> None:
        for name in ("num_train_steps", "log_every", "watch_every", "prefetch", "keep_last_checkpoints"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must be positive")
        check_seed("trainer.seed", self.seed)
        for name, least in (("store_patience_minutes", 0), ("store_lease_seconds", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must be at least {least}")
        if self.temporary_root is not None and not is_bucket(self.temporary_root):
            raise ValueError(f"trainer.temporary_root={self.temporary_root!r} must be a URL, gs://... or s3://...")
        if self.data_seed is not None:
            check_seed("trainer.data_seed", self.data_seed)
        if self.train_seq_len is not None and self.train_seq_len < 2:
            raise ValueError(f"trainer.train_seq_len={self.train_seq_len} must be at least 2: one predicts the next")
        if self.ema_beta is not None and not 0 <= self.ema_beta < 1:
            raise ValueError(f"trainer.ema_beta={self.ema_beta} must lie in [0, 1), or be null for no moving average")
        for name in ("z_loss_weight", "max_skipped_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must not be negative")
        for name, known in (
            ("compute_dtype", get_args(ComputeDtypeName)),
            ("cross_entropy", get_args(CrossEntropyName)),
            ("nonfinite", get_args(NonFinitePolicy)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"trainer.{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(known)}")
        profile_window(self.profile, self.num_train_steps)
        starts = [start for start, _ in self.batch_stages]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(
                f"trainer.train_batch_size={self.train_batch_size} must be pairs of (first step, sequences), "
                "the first at step 0 and each later than the one before"
            )
        for _, size in self.batch_stages:
            if size <= 0:
                raise ValueError(f"trainer.train_batch_size={self.train_batch_size} must be positive")
            if isinstance(self.microbatch_size, int):
                check_microbatch_size(self.microbatch_size, size)

    @property
    def batch_stages(self) -> tuple[tuple[int, int], ...]:
        """Pairs of (first step, sequences per step)."""
        size = self.train_batch_size
        return ((0, size),) if isinstance(size, int) else size

    def batch_size_at(self, step: int) -> int:
        """Sequences of the global batch of `step`."""
        return next(size for start, size in reversed(self.batch_stages) if start <= step)

    def data_offset(self, step: int) -> int:
        """Sequences consumed by the steps before `step`: the data offset of its batch."""
        ends = [start for start, _ in self.batch_stages[1:]] + [step]
        return sum(
            max(0, min(end, step) - start) * size for (start, size), end in zip(self.batch_stages, ends, strict=True)
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class GrugNativeRunConfig:
    """Everything that a run is made of. Fed back from a run's `config.yaml`, it makes the same run again."""

    model: ModelConfig
    """Shape and kernels of the model: `GrugModelConfig`, or in a file `type: package.module:Class` and its fields."""
    data: LmDataConfig
    """levanter's data config: components, mixture weights, tokenizer, caches."""
    optimizer: OptimizerConfig
    """Optimizer and schedule: in a file `type: adamw`, `muon`, `lion`, `levanter` or `package.module:Class`."""
    trainer: GrugTrainerConfig
    """Steps, batches, mesh, checkpoints, trackers."""
    eval: GrugEvalConfig = field(default_factory=GrugEvalConfig)
    """When and on what the model is evaluated."""
    output_path: str
    """Folder of the run: `runs/NAME`."""

    def __post_init__(self) -> None:
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"trainer.train_seq_len={self.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}: "
                "shorten the sequences or raise model.max_seq_len"
            )
        if not self.output_path or Path(self.output_path).is_file():
            raise ValueError(f"output_path={self.output_path!r} must be a folder, or a name that is free for one")
        if self.trainer.temporary_root is not None and not is_bucket(self.output_path):
            raise ValueError("trainer.temporary_root is for a run in a bucket, and output_path is a path: leave it out")
        validate_run_id(self.run_id)

    @override
    def __repr__(self) -> str:
        return "\n".join(f"{field.name}: {eqx.tree_pformat(getattr(self, field.name))}" for field in fields(self))

    @property
    def seq_len(self) -> int:
        """Tokens of a training sequence."""
        return self.model.max_seq_len if self.trainer.train_seq_len is None else self.trainer.train_seq_len

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return Path(self.output_path).name if self.trainer.run_id is None else self.trainer.run_id


COSMETIC_FIELDS = (
    "output_path",
    "eval",
    "data",
    "model.attention",
    "model.remat",
    "model.scan_layers",
    *(
        f"trainer.{name}"
        for name in (
            "mesh",
            "init_from",
            "microbatch_size",
            "log_every",
            "watch_every",
            "cross_entropy",
            "prefetch",
            "steps_per_checkpoint",
            "minutes_per_temporary_checkpoint",
            "keep_last_checkpoints",
            "max_skipped_steps",
            "allow_changes",
            "temporary_root",
            "store_patience_minutes",
            "store_lease_seconds",
            "run_id",
            "profile",
            "trackers",
        )
    ),
)
"""Fields, and whole sections, which leave the mathematics of a run as it is, so that a resumed run may change them.

`data` is among them because what matters of it, the tokens and their order, has a fingerprint of its own, and
`trainer.run_id` because the run's name, which it may leave to the folder, is compared by itself.
"""


def config_to_dict(config: GrugNativeRunConfig) -> dict[str, Any]:
    """The config as plain JSON data; a `ValueError` if a URL in it holds a password, as this is written to disk."""
    sections: dict[str, Any] = {
        "model": encode_named("model", config.model),
        "data": draccus.encode(config.data),
        "optimizer": encode_named("optimizer", config.optimizer),
        "trainer": asdict(replace(config.trainer, trackers=())) | {"trackers": []},
        "eval": asdict(config.eval),
        "output_path": config.output_path,
    }
    if config.trainer.trackers:
        from levanter.tracker import TrackerConfig as LevanterTrackerConfig

        trackers = config.trainer.trackers
        sections["trainer"]["trackers"] = [draccus.encode(tracker, LevanterTrackerConfig) for tracker in trackers]
    text = json.dumps(sections)
    if found := re.search(r"\w://[^/\s@\"]*:[^/\s@\"]*@([^/\"]*)", text):
        raise ValueError(f"the config holds a URL of {found[1]} with a password, and is written to disk: take it out")
    return json.loads(text)


def config_from_dict(raw: Mapping[str, Any]) -> GrugNativeRunConfig:
    """Reads what `config_to_dict` wrote; missing fields take their defaults. What is no mapping is taken as it is.

    Raises:
        ValueError: for an unknown key, with the nearest known name, or a value of the wrong type.
    """
    for name, keys in (("model", "type, vocab_size"), ("optimizer", "type, learning_rate")):
        section = raw.get(name, {})
        if not isinstance(section, Mapping) and (section is None or not is_dataclass(section)):
            raise no_mapping(name, section, f"with keys such as {keys}")
    sections = checked(GrugNativeRunConfig, spelled_out(upgraded(raw)))
    data, trainer = sections.get("data"), sections.get("trainer", {})
    if isinstance(data, Mapping):
        from levanter.data.text.datasets import LmDataConfig as LevanterDataConfig

        check_data(cast(Mapping[str, Any], data))
        known = checked(LevanterDataConfig, cast(Mapping[str, Any], data), "data.")
        sections["data"] = decode(LevanterDataConfig, known, "data.")
    elif "data" in sections and not is_dataclass(data):
        raise no_mapping("data", data, "with keys such as tokenizer, components, train_weights")
    if trackers := trainer.get("trackers"):
        from levanter.tracker import TrackerConfig as LevanterTrackerConfig

        if not all(isinstance(tracker, Mapping) for tracker in trackers):
            raise ValueError(f"trainer.trackers={trackers!r} must be a list of mappings, such as [{{type: wandb}}]")
        trainer |= {"trackers": [decode(LevanterTrackerConfig, tracker, "trainer.trackers.") for tracker in trackers]}
    sections["trainer"] = trainer
    decoders = {
        "model": partial(decode_named, "model"),
        "optimizer": partial(decode_named, "optimizer"),
        "trainer": lambda raw: decode(GrugTrainerConfig, raw, "trainer."),
        "eval": lambda raw: decode(GrugEvalConfig, raw, "eval."),
    }
    for name in decoders.keys() & sections.keys():
        if isinstance(sections[name], Mapping):
            sections[name] = decoders[name](sections[name])
    if missing := [item.name for item in fields(GrugNativeRunConfig) if item.name not in {*sections, "eval"}]:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    return GrugNativeRunConfig(**sections)


def save_config(config: GrugNativeRunConfig, path: str | Path) -> None:
    """Writes the config as YAML, whole or not at all."""
    _write_yaml(config_to_dict(config), Path(path))


def _write_yaml(raw: Mapping[str, Any], path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(yaml.safe_dump(dict(raw), sort_keys=False))
    fsync(partial)
    partial.replace(path)


def save_own_config(config: GrugNativeRunConfig) -> None:
    """Writes `config.yaml` into the run's folder: with absolute paths, and without what this one start allows."""
    own = replace(config, trainer=replace(config.trainer, allow_changes=()))
    _write_yaml(at_absolute_paths(config_to_dict(own)), files_of(config.output_path) / CONFIG_FILE)


def with_own_name(config: GrugNativeRunConfig) -> GrugNativeRunConfig:
    """The config under the name that the run in its folder has, if one has been started there and no other is given."""
    if config.trainer.run_id is not None:
        return config
    raw = recorded_config(config.output_path)
    name = config.run_id if raw is None else recorded_name(Path(config.output_path), raw)
    return config if name == config.run_id else replace(config, trainer=replace(config.trainer, run_id=name))


def load_config(path: str | Path) -> GrugNativeRunConfig:
    """Reads a config from YAML, or that of a run from its folder; see `read_config_file`.

    Raises:
        ValueError: for an unknown key, with the nearest known name, or a value that cannot be.
        FileNotFoundError: if there is no such file.
    """
    return config_from_dict(read_config_file(path))


def with_overrides(raw: Mapping[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Sets fields of a run's sections by their dotted names; see `grug_native.parsing.overrides.overridden`."""
    return overridden(GrugNativeRunConfig, raw, overrides)
