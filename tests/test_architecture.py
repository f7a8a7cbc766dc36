"""Who may import whom, as `pyproject.toml` says."""

import subprocess
import sys
from pathlib import Path


def test_imports_keep_to_the_contracts() -> None:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [lint_imports, "--no-cache", "--no-logo"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
