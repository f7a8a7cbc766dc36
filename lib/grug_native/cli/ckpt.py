"""`grug ckpt ls | show | verify | diff`: light, with neither JAX nor a device."""

import argparse
from pathlib import Path

from rich.console import Console

from grug_native.bucket.place import checkpoints_of, store_of
from grug_native.checkpoint.report import (
    checkpoints_table,
    diff_checkpoints,
    diff_table,
    list_checkpoints,
    metadata_table,
    verify_checkpoint,
)
from grug_native.checkpoint.source import Checkpoints, FolderCheckpoints
from grug_native.host.run_folder import CHECKPOINTS_FOLDER, is_bucket

_FAILED = 1


def list_all(arguments: argparse.Namespace) -> None:
    """Prints a run's checkpoints, newest first."""
    if is_bucket(arguments.run):
        from grug_native.bucket.reading import BucketCheckpoints

        entries = BucketCheckpoints(store_of(arguments.run, field="RUN")).listed()
    else:
        entries = list_checkpoints(_folder(arguments.run))
    if not entries:
        raise ValueError(f"{arguments.run} holds no checkpoint")
    Console().print(checkpoints_table(entries))


def show(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint says about itself."""
    Console().print(metadata_table(_checkpoints(arguments.run).find(arguments.step).read_metadata()))


def verify(arguments: argparse.Namespace) -> int:
    """Reads checkpoints and compares them with their digests; fails if one is not what was saved."""
    checkpoints = _checkpoints(arguments.run)
    every = checkpoints.every() if arguments.step is None else ()
    damaged = 0
    for path in every or [checkpoints.find(arguments.step)]:
        problems = verify_checkpoint(path)
        if problems and not path.exists():
            print(f"{path.name}: deleted by its run meanwhile")
            continue
        damaged += bool(problems)
        print(f"{path.name}: {'; '.join(problems) or 'sound'}")
    return _FAILED if damaged else 0


def diff(arguments: argparse.Namespace) -> None:
    """Prints how two checkpoints differ."""
    first = _checkpoints(arguments.run)
    second = first if arguments.other is None else _checkpoints(arguments.other)
    found = diff_checkpoints(first.find(arguments.a), second.find(arguments.b), values=arguments.values)
    if found.fields or found.structure or found.values:
        Console().print(diff_table(found))
    else:
        print(f"no difference: all {found.equal_leaves} leaves are equal")


def _checkpoints(run: str) -> Checkpoints:
    return checkpoints_of(run) if is_bucket(run) else FolderCheckpoints(_folder(run))


def _folder(run: str) -> Path:
    """The checkpoints of a run, given by its folder or by theirs."""
    path = Path(run)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give that of a run")
    return path / CHECKPOINTS_FOLDER if (path / CHECKPOINTS_FOLDER).is_dir() else path
