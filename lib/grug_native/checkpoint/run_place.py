"""A run where its folder is now: the folder's place, what moved with it, and the name that it keeps.

A folder that holds `config.yaml` is the run. Its paths are written absolute, and so is its own place, so that whoever
reads them elsewhere can tell what lay where beside it: taken is what lies there now, else a corpus of the same key near
by, and else the old address.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from grug_native.checkpoint.metadata import canonical_hash
from grug_native.data.corpus_store import RECORD_FILE
from grug_native.host.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, is_bucket

_PATH_KEYS = frozenset(("cache_dir", "cache_catalog", "train_urls", "validation_urls", "include_path"))
_NAME_OR_PATH_KEYS = frozenset(("tokenizer", "tasks"))
_CORPUS_KEY = re.compile("[0-9a-f]{16}")
_OF_A_START = ("run_id", "allow_changes")

logger = logging.getLogger(__name__)


def is_run(folder: Path) -> bool:
    """Whether a run has been started in `folder`."""
    return (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINTS_FOLDER).is_dir()


def read_config_file(path: Path) -> dict[str, Any]:
    """Reads the sections of a config from YAML, as plain data.

    Of a run, given by its folder or the `config.yaml` in it, they are those of the run that is there, wherever the file
    says that it is.

    Raises:
        ValueError: if the file is no YAML, or holds no sections; or the folder is no run's.
        FileNotFoundError: if there is no such file.
    """
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise ValueError(f"{path} is no folder of a run: it has no {CONFIG_FILE}")
        return at_its_place(read_yaml(path / CONFIG_FILE), path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the YAML of a run, or the folder of one, runs/NAME")
    raw = read_yaml(path)
    return at_its_place(raw, path.parent) if path.name == CONFIG_FILE and is_run(path.parent) else raw


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a mapping from YAML, as it is written.

    Raises:
        ValueError: if the file is no YAML, or holds no mapping.
    """
    return parsed_yaml(path.read_text(), path)


def parsed_yaml(text: str, path: Path | str) -> dict[str, Any]:
    """Reads a mapping from the YAML of the file at `path`; raises as `read_yaml`."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"{path} holds no mapping: it should have the keys model, data, optimizer, trainer, output_path"
        )
    return dict(cast(Mapping[str, Any], raw))


def tokenizer_of(run: Path) -> str | None:
    """The tokenizer of the run in a folder; None if none has been started there."""
    return read_config_file(run)["data"].get("tokenizer") if is_run(run) else None


def at_its_place(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the sections of the `config.yaml` in `folder` as those of the run that is there.

    The folder's own place wins over the `output_path` that is written, which is said. A run that has been started keeps
    its name; so its checkpoints stay its own. Paths lead to what moved with it, as far as that is there.
    """
    written, here = raw.get("output_path"), Path(os.path.normpath(folder))
    placed = dict(raw) | {"output_path": str(here)}
    if not isinstance(written, str):
        return placed
    if Path(written).resolve() != here.resolve():
        other = "; that one is a run too, and is left alone" if is_run(Path(written)) else ""
        logger.warning("the run is %s: its folder counts, and not the output_path=%r in it%s", here, written, other)
    name, trainer = Path(os.path.abspath(written)).name, raw.get("trainer")
    if is_run(here) and isinstance(trainer, Mapping) and name != Path(os.path.abspath(here)).name:
        own = cast(Mapping[str, Any], trainer)
        placed["trainer"] = dict(own) | ({"run_id": name} if own.get("run_id") is None else {})
    return _with_paths(placed, lambda path, _: _now_at(path, written, here))


def at_its_url(raw: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Returns the sections of the `config.yaml` of a run in a bucket, where it is now; it keeps its name."""
    trainer = cast(Mapping[str, Any], raw.get("trainer") or {})
    name = recorded_name(Path(url), raw)
    return dict(raw) | {"output_path": url, "trainer": {**trainer, "run_id": trainer.get("run_id") or name}}


def at_absolute_paths(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sections of a config with the paths in them absolute, as seen from the working directory."""

    def absolute(path: str, is_path: bool) -> str:
        return os.path.abspath(path) if is_path or os.path.exists(path) else path

    place = raw["output_path"]
    return _with_paths(dict(raw), absolute) | {"output_path": place if is_bucket(place) else os.path.abspath(place)}


def recorded_name(folder: Path, raw: Mapping[str, Any]) -> str:
    """The name of the run in `folder`, of which `raw` is the `config.yaml`."""
    trainer = cast(Mapping[str, Any], raw.get("trainer") or {})
    return trainer.get("run_id") or Path(os.path.abspath(raw.get("output_path") or folder)).name


def settings_hash(raw: Mapping[str, Any]) -> str:
    """SHA-256 of a config but for where things are, the run's name, and what one start allowed."""
    lasting = {name: value for name, value in raw["trainer"].items() if name not in _OF_A_START}
    return canonical_hash(placeless(dict(raw) | {"trainer": lasting}))


def placeless(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a config without the places of things: of a path, what tells it from others is left."""
    sections = {name: value for name, value in raw.items() if name != "output_path"}
    return _with_paths(sections, lambda path, _: _after_key(path) or os.path.basename(path.rstrip("/")))


def _now_at(path: str, old_folder: str, folder: Path) -> str:
    here = Path(os.path.abspath(folder))
    if os.path.isabs(path) == os.path.isabs(old_folder):
        beside = os.path.normpath(here / os.path.relpath(path, old_folder))
        if os.path.exists(beside):
            return path if beside == os.path.abspath(path) else beside
    inside = _after_key(path)
    if inside is not None:
        parts = Path(path).parts
        last = len(parts) - len(Path(inside).parts)
        for near in (*here.parents, Path.cwd()):
            for first in range(last, 0 if os.path.isabs(path) else -1, -1):
                if near.joinpath(*parts[first : last + 1], RECORD_FILE).is_file():
                    return str(near.joinpath(*parts[first:]))
    return path


def _after_key(path: str) -> str | None:
    """The path from the folder of a corpus on, which is named by its key; None if it leads through none."""
    parts = Path(path).parts
    first = next((number for number, part in enumerate(parts) if _CORPUS_KEY.fullmatch(part)), None)
    return None if first is None else str(Path(*parts[first:]))


def _with_paths(sections: Mapping[str, Any], change: Callable[[str, bool], str]) -> dict[str, Any]:
    """Changes the paths in `data`, `eval` and `trainer.init_from`; `change` is told whether it is one, or a name."""
    changed = dict(sections)
    if isinstance(trainer := changed.get("trainer"), Mapping):
        own = cast(Mapping[str, Any], trainer)
        if isinstance(origin := own.get("init_from"), Mapping) and "://" not in origin["source"]:
            changed["trainer"] = {**own, "init_from": {**origin, "source": change(origin["source"], True)}}
    for name in ("data", "eval"):
        if isinstance(section := changed.get(name), Mapping):
            changed[name] = _walk(cast(Mapping[str, Any], section), change)
    return changed


def _walk(section: Mapping[str, Any], change: Callable[[str, bool], str]) -> dict[str, Any]:
    def changed(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _walk(cast(Mapping[str, Any], value), change)
        if isinstance(value, list | tuple):
            return [changed(key, item) for item in cast(list[Any], value)]
        if isinstance(value, str) and value and key in _PATH_KEYS | _NAME_OR_PATH_KEYS and "://" not in value:
            return change(value, key in _PATH_KEYS)
        return value

    return {key: changed(key, value) for key, value in section.items()}
