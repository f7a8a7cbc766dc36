"""What a command says of an error, and how it exits."""

import sys
from collections.abc import Generator
from contextlib import contextmanager

import jax

from grug_native.checkpoint.metadata import NoUsableCheckpointError
from grug_native.host.run_folder import RunLockedError
from grug_native.host.signals import ExitCode


def explain(error: Exception) -> tuple[ExitCode, str] | None:
    """The exit code and the words for an error that a user can do something about; None for any other."""
    words = str(error)
    match error:
        case NoUsableCheckpointError():
            return ExitCode.NO_USABLE_CHECKPOINT, words
        case RunLockedError():
            return ExitCode.LOCKED, words
        case FileNotFoundError() | ValueError():
            return ExitCode.REFUSED, words
        case jax.errors.JaxRuntimeError():
            if "RESOURCE_EXHAUSTED" not in words:
                return None
            way_out = "set trainer.microbatch_size=auto or a small number, or model.remat=full, or use more devices"
            return ExitCode.FAILED, f"the device's memory is too small: {way_out}.\n{words.splitlines()[0]}"
        case _:
            # Errors of our own classes are documented, and say what to do.
            ours = type(error).__module__.startswith("grug_native.")
            return (ExitCode.FAILED, words) if ours or isinstance(error, OSError) else None


@contextmanager
def explained_exit(program: str, *, debug: bool) -> Generator[None]:
    """Ends the process with the exit code and the words for an error; any other, and with `debug` all, are raised."""
    try:
        yield
    except Exception as error:
        explained = None if debug else explain(error)
        if explained is None:
            raise
        code, words = explained
        print(f"{program}: {words}", file=sys.stderr)
        raise SystemExit(code) from None
