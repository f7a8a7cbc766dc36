"""`grug ckpt ls | show | verify | diff`: light, with neither JAX nor a device."""

import argparse
from pathlib import Path

from rich.console import Console

from grug_native.checkpoint.metadata import read_metadata
from grug_native.checkpoint.report import (
    checkpoints_table,
    diff_checkpoints,
    diff_table,
    list_checkpoints,
    metadata_table,
    verify_checkpoint,
)
from grug_native.host.run_folder import CHECKPOINTS_FOLDER, committed_steps, find_checkpoint, step_name

_FAILED = 1


def list_all(arguments: argparse.Namespace) -> None:
    """Prints a run's checkpoints, newest first."""
    folder = _folder(arguments.run)
    entries = list_checkpoints(folder)
    if not entries:
        raise ValueError(f"{folder} holds no checkpoint")
    Console().print(checkpoints_table(entries))


def show(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint says about itself."""
    Console().print(metadata_table(read_metadata(find_checkpoint(_folder(arguments.run), arguments.step))))


def verify(arguments: argparse.Namespace) -> int:
    """Reads checkpoints and compares them with their digests; fails if one is not what was saved."""
    folder = _folder(arguments.run)
    if arguments.step is None:
        paths = [folder / step_name(step) for step in committed_steps(folder)] or [find_checkpoint(folder, None)]
    else:
        paths = [find_checkpoint(folder, arguments.step)]
    damaged = 0
    for path in paths:
        problems = verify_checkpoint(path)
        if problems and not path.exists():
            print(f"{path.name}: deleted by its run meanwhile")
            continue
        damaged += bool(problems)
        print(f"{path.name}: {'; '.join(problems) or 'sound'}")
    return _FAILED if damaged else 0


def diff(arguments: argparse.Namespace) -> None:
    """Prints how two checkpoints differ."""
    first = _folder(arguments.run)
    second = first if arguments.other is None else _folder(arguments.other)
    found = diff_checkpoints(
        find_checkpoint(first, arguments.a), find_checkpoint(second, arguments.b), values=arguments.values
    )
    if found.fields or found.structure or found.values:
        Console().print(diff_table(found))
    else:
        print(f"no difference: all {found.equal_leaves} leaves are equal")


def _folder(run: str) -> Path:
    """The checkpoints of a run, given by its folder or by theirs."""
    path = Path(run)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give that of a run")
    return path / CHECKPOINTS_FOLDER if (path / CHECKPOINTS_FOLDER).is_dir() else path
