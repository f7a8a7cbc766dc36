"""Where parameters can come from: a checkpoint of a run, or a Hugging Face folder. Opening one reads no array yet."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, final, override, runtime_checkable

import jax
import numpy as np

from grug_native.bucket.place import checkpoints_of, read_config_file
from grug_native.checkpoint.leaves import finish_digests, leaf_records, named_leaves, start_digests, with_leaves
from grug_native.checkpoint.metadata import DamagedCheckpointError, canonical_hash, leaf_differences
from grug_native.checkpoint.orbax_io import load_params
from grug_native.data.vocabulary import TOKENIZER_FILE
from grug_native.host.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, is_bucket
from grug_native.language_model import HfModelConfig, LanguageModel, ModelConfig, hf_form
from grug_native.parsing.named_types import encode_named
from grug_native.parsing.old_configs import upgraded
from grug_native.weights.config import InitFrom
from grug_native.weights.hf_tensors import Index, Tensors, tensors_of
from grug_native.weights.safetensors_io import TensorFolder

HF_CONFIG_FILE = "config.json"
"""In a Hugging Face folder, what the model is."""


@runtime_checkable
class WeightSource(Protocol):
    """Parameters that can be loaded; as text, where they are."""

    @property
    def init_from(self) -> InitFrom:
        """What was asked for, with the step that is meant and the whole path."""
        ...

    def models(self, own: ModelConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Returns the `model` section of their config, and `own` spelled in the same way, as plain data."""
        ...

    @property
    def tokenizer(self) -> str:
        """The tokenizer that they were trained with: a folder, or a name on a hub."""
        ...

    @property
    def tokenizer_digest(self) -> str | None:
        """SHA-256 of its `tokenizer.json`, where that was recorded."""
        ...

    def differences(self, params: LanguageModel) -> list[str]:
        """Returns a line for each parameter that is of another shape there, or only there, or only here."""
        ...

    def load(self, params: LanguageModel) -> tuple[LanguageModel, str]:
        """Loads the parameters into the layout of abstract ones, under their mesh; returns their digest too.

        Raises:
            DamagedCheckpointError: They are not what was saved.
            ValueError: One is not finite.
        """
        ...


def open_source(init_from: InitFrom, model: ModelConfig) -> WeightSource:
    """Opens what `trainer.init_from` names, for a run with this model.

    Raises:
        ValueError: There is no such run, checkpoint or folder, or it is not to be read.
        DamagedCheckpointError: The checkpoint is damaged.
    """
    if is_run(init_from):
        return RunWeights(init_from)
    return HfWeights(init_from, model)


def is_run(init_from: InitFrom) -> bool:
    """Whether the parameters are those of a run; else they are in a Hugging Face folder.

    Raises:
        ValueError: There is neither.
    """
    place = init_from.source
    if is_bucket(place):
        return True
    folder = Path(place)
    if (folder / HF_CONFIG_FILE).is_file():
        if init_from.step is not None or init_from.ema:
            raise ValueError(
                f"trainer.init_from.source={place!r} is no run, and has neither steps nor a moving average"
            )
        return False
    if (folder / CONFIG_FILE).is_file() or (folder / CHECKPOINTS_FOLDER).is_dir():
        return True
    raise ValueError(
        f"trainer.init_from.source={place!r} is neither the folder of a run, which has a {CONFIG_FILE}, nor one of "
        f"Hugging Face's files, which has a {HF_CONFIG_FILE}"
    )


def hf_model(folder: Path, from_hf: Callable[[Mapping[str, Any]], ModelConfig]) -> Mapping[str, Any]:
    """The `model` section of what a Hugging Face folder promises.

    Args:
        folder: with a `config.json`.
        from_hf: of the wanted class; see `HfModelConfig`.

    Raises:
        ValueError: the class does not have what is promised, or the file holds no config.
    """
    file = folder / HF_CONFIG_FILE
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(raw, Mapping):
        raise ValueError(f"{file} holds no mapping")
    try:
        return encode_named("model", from_hf(cast(Mapping[str, Any], raw)))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def hf_tokenizer(folder: Path) -> str:
    """The tokenizer of a Hugging Face folder; a `ValueError` if it has none that is read here."""
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(
            f"{folder} has no {TOKENIZER_FILE}, so what its ids mean is not known: put the one in it with which the "
            "model was trained (of a tokenizer.model, transformers makes one)"
        )
    return os.path.abspath(folder)


@final
class RunWeights:
    """Those of a checkpoint of a run."""

    def __init__(self, init_from: InitFrom):
        self._checkpoint = checkpoints_of(init_from.source).find(init_from.step)
        self._metadata = self._checkpoint.read_metadata()
        field = "ema_params." if init_from.ema else "params."
        records = self._metadata.leaves.items()
        self._leaves = {name.removeprefix(field): record for name, record in records if name.startswith(field)}
        if not self._leaves:
            raise ValueError(f"{self._checkpoint} keeps no moving average: leave trainer.init_from.ema out")
        place = init_from.source
        place = place if is_bucket(place) else os.path.abspath(place)
        self.init_from = replace(init_from, source=place, step=self._metadata.step)

    @override
    def __str__(self) -> str:
        return f"{self._checkpoint}{' (moving average)' if self.init_from.ema else ''}"

    def models(self, own: ModelConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """As the checkpoint recorded it, and as this one will."""
        return upgraded(self._metadata.config)["model"], encode_named("model", own)

    @property
    def tokenizer(self) -> str:
        """As the run's config names it."""
        return read_config_file(self.init_from.source)["data"]["tokenizer"]

    @property
    def tokenizer_digest(self) -> str | None:
        """As the checkpoint recorded it."""
        return self._metadata.tokenizer_digest

    def differences(self, params: LanguageModel) -> list[str]:
        """Returns a line for each leaf."""
        found = leaf_differences(self._leaves, leaf_records(named_leaves(params)))
        return [_line(d.name, d.stored, d.wanted) for d in found]

    def load(self, params: LanguageModel) -> tuple[LanguageModel, str]:
        """Loads and proves them."""
        try:
            loaded = load_params(self._checkpoint, params, ema=self.init_from.ema)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{self} is damaged: {error}") from error
        return loaded, canonical_hash({name: record.digest for name, record in self._leaves.items()})


@final
class HfWeights:
    """Those of a Hugging Face folder."""

    def __init__(self, init_from: InitFrom, model: ModelConfig):
        self._folder, self._form = Path(init_from.source), hf_form(model)
        assert isinstance(model, HfModelConfig)
        self._model = hf_model(self._folder, model.from_hf)
        self._shapes = TensorFolder(self._folder).shapes
        self.init_from = replace(init_from, source=os.path.abspath(self._folder))
        self.tokenizer = hf_tokenizer(self._folder)
        self.tokenizer_digest = None

    @override
    def __str__(self) -> str:
        return str(self._folder)

    def models(self, own: ModelConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Both as they are read, which spells out what may be left to a default here."""
        assert isinstance(own, HfModelConfig)
        return self._model, encode_named("model", own.from_hf(self._form.config))

    def differences(self, params: LanguageModel) -> list[str]:
        """Returns a line for each parameter; where only some of its layers differ, for each tensor."""
        there, lines = self._shapes, list[str]()
        leaves = named_leaves(params)
        tensors = tensors_of(self._form, params)
        for leaf, of_leaf in tensors.items():
            found = [there.get(name) for name in of_leaf.names]
            first = found[0]
            if first is not None and first != of_leaf.shape and set(found) == {first}:
                lines.append(_line(leaf, list(of_leaf.seen_from_here(first)), list(leaves[leaf].shape)))
                continue
            for name, shape in zip(of_leaf.names, found, strict=True):
                if shape != of_leaf.shape:
                    lines.append(_line(name, None if shape is None else list(shape), list(of_leaf.shape)))
        known = {name for of_leaf in tensors.values() for name in of_leaf.names}
        extra = [name for name in there if name not in known and not name.endswith(self._form.ignored)]
        return lines + [_line(name, list(there[name]), None) for name in extra]

    def load(self, params: LanguageModel) -> tuple[LanguageModel, str]:
        """Loads them block by block, as f32."""
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tensors, files = tensors_of(self._form, params), TensorFolder(self._folder)
        arrays = {
            name: jax.make_array_from_callback(
                leaf.shape, leaf.sharding or default, partial(_read, files, tensors[name])
            )
            for name, leaf in named_leaves(params).items()
        }
        digests, bad = finish_digests(start_digests(arrays))
        if bad:
            raise ValueError(f"{self}: {', '.join(bad)} is not finite, and no training goes on from there")
        return with_leaves(params, arrays), canonical_hash(digests)


def _read(files: TensorFolder, tensors: Tensors, index: Index | None) -> np.ndarray:
    """A block of a parameter, for `jax.make_array_from_callback`."""
    assert index is not None
    return tensors.join([files.read(name, block) for name, block in tensors.blocks(index)])


def _line(name: str, there: Sequence[int] | str | None, here: Sequence[int] | str | None) -> str:
    shown = ["missing" if shape is None else str(shape) for shape in (there, here)]
    return f"{name}: {shown[0]} there, {shown[1]} here"
