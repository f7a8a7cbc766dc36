"""The sections of a config whose class its file names: `type: muon`, or `type: package.module:Class`."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import draccus

from grug_native.levanter_optimizer import LevanterOptimizer
from grug_native.parsing.check import checked, decode, no_mapping

_OURS: dict[str, dict[str, str]] = {
    "model": {"transformer": "grug_native.model:GrugModelConfig"},
    "optimizer": {
        "adamw": "grug_native.optimizer:AdamWConfig",
        "muon": "grug_native.optimizer:MuonConfig",
        "lion": "grug_native.optimizer:LionConfig",
        "levanter": "grug_native.levanter_optimizer:LevanterOptimizer",
    },
}
"""Short names of our own classes by section; the first is the one that a file without `type` means."""

_OF_ANY_OPTIMIZER = {"schedule", "max_grad_norm"}
"""Rates, betas and decay of one are wrong for another."""

_METHODS = {"model": ("init",), "optimizer": ("build", "build_schedule", "groups")}
"""What a class of yours has to have."""


def encode_named(section: str, config: Any) -> dict[str, Any]:
    """A section as plain data, its class under `type`."""
    address = f"{type(config).__module__}:{type(config).__qualname__}"
    name = next((short for short, ours in _OURS[section].items() if ours == address), address)
    if isinstance(config, LevanterOptimizer):
        from levanter.optim.config import OptimizerConfig as LevanterOptimizerConfig

        return {"type": name, "levanter": draccus.encode(config.levanter, LevanterOptimizerConfig)}
    return {"type": name} | asdict(config)


def decode_named(section: str, raw: Mapping[str, Any]) -> Any:
    """Makes a section of plain data. A part of it that is given by halves keeps the rest of its default.

    A class that is not ours is imported: so this is for configs that a user hands over, and never for what comes with a
    checkpoint or from a hub.

    Raises:
        ValueError: if there is no such class, or it is no config of that kind; or as `checked` and `decode`.
    """
    given = {name: value for name, value in raw.items() if name != "type"}
    kind = _find_class(section, raw.get("type", next(iter(_OURS[section]))))
    if kind is LevanterOptimizer:
        given |= {"levanter": _decode_levanter(given.get("levanter"))}
    known = checked(kind, given, f"{section}.")
    defaults = {item.name: item.default for item in fields(kind)}
    for name, value in known.items():
        default = defaults[name]
        if isinstance(value, Mapping) and is_dataclass(default) and not isinstance(default, type):
            known[name] = {**asdict(default), **value}
    return decode(kind, known, f"{section}.")


def shared_fields(section: str, raw: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Of a section, what stays where a class is named; of another optimizer, only what is not its own to choose."""
    known = {item.name for item in fields(_find_class(section, kind))}
    if section == "optimizer" and _address(section, kind) != _address(
        section, raw.get("type", next(iter(_OURS[section])))
    ):
        known &= _OF_ANY_OPTIMIZER
    return {name: value for name, value in raw.items() if name in known}


def _decode_levanter(raw: Any) -> Any:
    from levanter.optim.config import OptimizerConfig as LevanterOptimizerConfig

    if isinstance(raw, Mapping):
        return decode(LevanterOptimizerConfig, raw, "optimizer.levanter.")
    if raw is None or not is_dataclass(raw):
        raise no_mapping("optimizer.levanter", raw, "such as {type: adam}")
    return raw


def _address(section: str, name: Any) -> str:
    return _OURS[section].get(name, str(name))


def _find_class(section: str, name: Any) -> type:
    ours = _OURS[section]
    module, colon, attribute = _address(section, name).partition(":")
    if not colon:
        raise ValueError(
            f"{section}.type={name!r} is unknown: choose one of {', '.join(ours)}, or name a class of yours as "
            "package.module:Class"
        )
    here = str(Path.cwd())
    if name not in ours and here not in sys.path:
        sys.path.append(here)  # `grug` is started from its own folder; last, so that nothing is shadowed.
    try:
        kind = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # The module is there, and lacks something itself.
        raise ValueError(
            f"{section}.type={name!r}: there is no module {error.name}: install its package, or start in the folder "
            "where it is"
        ) from error
    if not isinstance(kind, type) or not is_dataclass(kind) or not all(hasattr(kind, m) for m in _METHODS[section]):
        wanted = " and ".join(_METHODS[section])
        raise ValueError(f"{section}.type={name!r} must be a frozen dataclass with {wanted}; it is {kind!r}")
    return kind
