"""Words for a shell."""

import shlex


def offer(field: str, value: str) -> str:
    """An override as it can be pasted behind a command: `'--trainer.allow_changes=[model, data]'`."""
    return shlex.quote(f"--{field}={value}")
