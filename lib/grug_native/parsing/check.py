"""A config as plain data, before it is made: known keys, sections where sections belong, text where text belongs."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin

import draccus
import yaml

from grug_native.data.mixture import check_names

_DATA_KEYS = (
    "tokenizer vocab_size cache_dir cache_catalog cache_options enforce_eos auto_build_caches chat_template shuffle "
    "permutation_type block_cross_document_attention components train_weights stop_strategy target_budget "
    "experiment_budget mixture_block_size max_train_batches num_validation_sequences shuffle_before_trainval_split "
    "prior_context_phases"
)
DATA_KEYS = tuple(_DATA_KEYS.split())
"""The fields of levanter's `LmDataConfig`, which takes seconds to import."""


def checked(kind: type, raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a section's fields, a lone value where a tuple belongs as a tuple of one.

    Args:
        kind: the dataclass that the section becomes.
        raw: the section.
        prefix: dotted name of the section, with a dot at its end; "" at the top.

    Raises:
        ValueError: for an unknown key, with the nearest known name, or a value that is no section, list or text where
            one belongs.
    """
    known = {item.name: item.type for item in fields(kind)}
    for key in raw:
        _check_known(key, list(known), prefix)
    return {key: _checked_value(known[key], value, f"{prefix}{key}") for key, value in raw.items()}


def _check_known(key: str, known: Sequence[str], prefix: str) -> None:
    if key in known:
        return
    close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    nearest = f"did you mean {close[0]}?" if close else f"the keys here are {', '.join(known)}"
    raise ValueError(f"unknown config key {prefix}{key}: {nearest}")


def _checked_value(kind: Any, value: Any, name: str) -> Any:
    members = _members(kind)
    if Any in members or (value is None and NoneType in members):
        return value
    section = next((member for member in members if is_dataclass(member)), None)
    if section is not None and isinstance(value, Mapping):
        return checked(cast(type, section), cast(Mapping[str, Any], value), f"{name}.")
    if section is not None and set(members) <= {section, NoneType}:
        keys = ", ".join(item.name for item in fields(section)[:3])
        optional = all(item.default is not MISSING or item.default_factory is not MISSING for item in fields(section))
        way_out = "; leave it out for the defaults" if optional else ""
        raise no_mapping(name, value, f"with keys such as {keys}{way_out}")
    if get_origin(kind) is tuple:
        return _checked_items(kind, value, name)
    if value is None:
        wanted = kind.__name__ if kind in (int, float, bool, str) else str(kind).replace("typing.", "")
        raise ValueError(f"{name} is null, and must be of type {wanted}")
    if set(members) <= {str, NoneType} and not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be text: put it in quotes")
    return value


def _checked_items(kind: Any, value: Any, name: str) -> Any:
    if isinstance(value, str | Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}={_shown(value)} must be a list, such as [a, b], or [] for none")
    items = cast(Sequence[Any], value)
    if get_args(kind)[0] is str:
        for item in items:
            if not isinstance(item, str):
                raise ValueError(f"{name}={value!r}: {item!r} must be text: put it in quotes")
    return items


def no_mapping(name: str, value: Any, wanted: str) -> ValueError:
    """The refusal of what stands where a mapping belongs."""
    return ValueError(f"{name}={_shown(value)} must be a mapping {wanted}")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def check_data(raw: Mapping[str, Any]) -> None:
    """Refuses what can be known to be wrong with the `data` section without levanter.

    Raises:
        ValueError: for an unknown key, with the nearest known name; a value that cannot be; or weights of what is
            no component.
    """
    for key in raw:
        _check_known(key, DATA_KEYS, "data.")
    for key, wanted in (("tokenizer", str), ("mixture_block_size", int), ("block_cross_document_attention", bool)):
        if key in raw and not isinstance(raw[key], wanted):
            raise ValueError(f"data.{key}={_shown(raw[key])} must be of type {wanted.__name__}")
    components = raw.get("components", {})
    if not isinstance(components, Mapping):
        raise no_mapping("data.components", components, "from names to components")
    for name, component in cast(Mapping[str, Any], components).items():
        if not isinstance(component, Mapping):
            raise no_mapping(f"data.components.{name}", component, "such as {source: {id: A/B}}")
    weights = {} if raw.get("train_weights") is None else raw["train_weights"]
    stages = weights if isinstance(weights, list | tuple) else [(0, weights)]
    if not all(_is_stage(stage) for stage in cast(Sequence[Any], stages)):
        raise ValueError(
            f"data.train_weights={weights!r} must be the weights of the components, such as {{a: 0.5, b: 0.5}}, or "
            "a list of stages, such as [[0, {a: 1}], [100, {a: 0.5, b: 0.5}]]"
        )
    check_names(weights, cast(Mapping[str, Any], components))


def _is_stage(stage: Any) -> bool:
    match stage:
        case [int(), Mapping() as weights]:
            values = cast(Mapping[str, Any], weights).values()
            return all(isinstance(weight, int | float | str) for weight in values)
        case _:
            return False


def decode[Config](kind: type[Config], raw: Mapping[str, Any], prefix: str) -> Config:
    """Makes a config of checked data; a `ValueError` says which field was refused, and why."""
    if issubclass(kind, draccus.PluginRegistry):
        choices = list(kind.get_known_choices())
        if raw.get("type") not in choices:
            raise ValueError(f"{prefix}type={raw.get('type')!r} is unknown: choose one of {', '.join(choices)}")
    try:
        return draccus.decode(kind, raw)
    except draccus.ParsingError as error:
        refusal: BaseException = error
        # draccus only says which class refused; the refusal itself is the cause.
        while "Couldn't instantiate" in str(refusal) and refusal.__cause__ is not None:
            refusal = refusal.__cause__
        words = re.sub(r" \(<class '\w+'>\)", "", " ".join(str(refusal).split()))
        raise ValueError(re.sub("`(.*?)`", r"\1", words.replace("`", f"`{prefix}", 1))) from error


def read_value(kind: type, name: str, typed: str) -> Any:
    """What somebody typed for a field: text where the field is text, and YAML elsewhere.

    Args:
        kind: the dataclass of the whole config.
        name: dotted name of the field.
        typed: the words.

    Raises:
        ValueError: if that is no YAML.
    """
    declared: Any = kind
    for part in name.split("."):
        section = next((member for member in _members(declared) if is_dataclass(member)), None)
        known = {} if section is None else {item.name: item.type for item in fields(section)}
        declared = known.get(part)
    text = declared is str or (declared == str | None and typed not in ("null", "~", ""))
    if text or (declared == tuple[str, ...] and not typed.lstrip().startswith("[")):
        return typed
    try:
        return yaml.safe_load(typed)
    except yaml.YAMLError as error:
        raise ValueError(f"--{name} {typed!r} is no YAML: {error}") from error
