"""Which of anyone's texts belong together: the domains of a run on text, found from folders and names."""

import re
from collections.abc import Mapping
from pathlib import Path

from grug_native.data.corpus import domain_name
from grug_native.data.text_files import ROW_SUFFIXES, TEXT_SUFFIXES, compression, suffix

SMALLEST_DOMAIN = 100_000
"""Bytes. Less text of one kind is no domain of its own: its held-out part would say nothing."""
_SMALLEST_SHARE = 0.05
"""Of all text, likewise."""
_NAMES_OF_PARTS = frozenset(
    ("", "train", "training", "validation", "valid", "val", "dev", "test", "data", "part", "shard", "chunk")
)
"""What a file is called that is a part of a whole, and says nothing of it."""


def text_domains(path: Path, sizes: Mapping[Path, int]) -> dict[str, list[Path]]:
    """The text files under a path by domain, as in `{"md": [...], "py": [...]}`; little ones go to the largest.

    Where texts of several suffixes are there, a text's domain is its suffix; else the folder in `path` where it is, or
    `path` itself. A file with a document a row says by its suffix nothing of what is in it: its domain is the folder in
    `path` where it is, or else its own name, without the numbers that tell parts of a whole apart.

    Args:
        path: a folder, or a file.
        sizes: bytes of text of each file under it.
    """
    several = len({suffix(file) for file in sizes if suffix(file) in TEXT_SUFFIXES}) > 1
    names: dict[str, list[Path]] = {}
    for file in sizes:
        names.setdefault(_domain(path, file, several_suffixes=several), []).append(file)
    bytes_of = {name: sum(sizes[file] for file in files) for name, files in names.items()}
    enough = max(SMALLEST_DOMAIN, _SMALLEST_SHARE * sum(bytes_of.values()))
    largest = max(bytes_of, key=lambda name: (bytes_of[name], name))
    domains = {name: names[name] for name in sorted(names) if name == largest or bytes_of[name] >= enough}
    rest = [file for name, files in names.items() if name not in domains for file in files]
    return domains | {largest: sorted([*domains[largest], *rest])}


def _domain(path: Path, file: Path, *, several_suffixes: bool) -> str:
    if path.is_file():
        return domain_name(file_stem(path))
    if suffix(file) not in ROW_SUFFIXES and several_suffixes:
        return suffix(file).removeprefix(".")
    folders = file.relative_to(path).parts[:-1]
    whole = domain_name(path.resolve().name)
    if folders:
        return domain_name(folders[0])
    if suffix(file) not in ROW_SUFFIXES:
        return whole
    unnumbered = re.sub(r"([-_.]?\d+([-_]?of[-_]?\d+)?)+$", "", file_stem(file))
    return whole if unnumbered.lower() in _NAMES_OF_PARTS else domain_name(unnumbered)


def file_stem(file: Path) -> str:
    """The name of a file of text without its kind, or of a folder."""
    if file.is_dir():
        return file.name
    return Path(file.stem if compression(file) else file.name).stem
