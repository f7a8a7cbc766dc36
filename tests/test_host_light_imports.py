"""levanter's data stack is imported without what it has no need of; whoever uses that, gets it."""

import copy
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grug_native.host import light_imports
from grug_native.host.light_imports import PUT_OFF, VERSIONS, StandIn

ROOT = Path(__file__).parent.parent

HEAVY = (
    "aiohttp",
    "datasets",
    "duckdb",
    "finestore",
    "google.cloud.storage",
    "iris",
    "levanter.layers.attention",
    "levanter.models.loss",
    "pandas",
    "polars",
    "requests",
    "s3fs",
    "starlette",
    "wandb",
    "zephyr.context",
)
"""What a run on token caches has no use of."""

REPORT = f"""
import json, sys
from grug_native.data import loader
from grug_native.evaluation import perplexity
import levanter.tracker
from grug_native.host import light_imports

loaded = [name for name in {HEAVY!r} if name in sys.modules]
put_off = sorted(light_imports.put_off)

from levanter.data import sharded_datasource
from levanter.store import cache
waits = [type(sharded_datasource.datasets).__name__, type(cache.ZephyrContext).__name__]
rows = sharded_datasource.datasets.Dataset.from_list([{{"text": "a"}}])
assert isinstance(rows, sys.modules["datasets"].Dataset)
import pandas
assert pandas is sys.modules["pandas"] and len(pandas.DataFrame({{"a": [1]}})) == 1
waits += [type(sharded_datasource.datasets).__name__, type(cache.ZephyrContext).__name__]
print(json.dumps({{"loaded": loaded, "put_off": put_off, "waits": waits}}))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", REPORT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_has_no_use_is_not_imported(report: dict[str, Any]) -> None:
    assert report["loaded"] == []


def test_every_import_of_the_list_is_met(report: dict[str, Any]) -> None:
    listed = [[module, target] for module, groups in PUT_OFF.items() for each in groups.values() for target in each]
    assert report["put_off"] == sorted(listed)


def test_who_uses_it_gets_the_real_thing(report: dict[str, Any]) -> None:
    assert report["waits"] == ["StandIn", "StandIn", "module", "StandIn"]


def test_the_list_is_of_the_versions_that_are_installed() -> None:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {module.partition(".")[0] for module in PUT_OFF} == VERSIONS.keys()
    for name, known in VERSIONS.values():
        assert metadata.version(name) == known, f"read the modules of {name} in PUT_OFF again"
        assert f"{name}=={known}" in pins or name == "deepdiff"


BODY = """
import json.decoder
import wave as sound
from fractions import Fraction
from queue import Empty, Queue
from graphlib import TopologicalSorter

try:
    import not_installed_anywhere
except ImportError:
    not_installed_anywhere = None

class Half(Fraction):
    pass

def parse(text: str) -> json.decoder.JSONDecoder | None:
    return json.loads(text)

def take():
    try:
        return Queue().get_nowait()
    except Empty:
        return "nothing"
"""
GROUPS = {
    "tables": ("json.decoder",),
    "sound": ("wave",),
    "numbers": ("fractions",),
    "queues": ("queue",),
    "order": ("graphlib",),
    "more": ("not_installed_anywhere",),
}


@pytest.fixture
def importer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "an_importer.py").write_text(BODY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PUT_OFF, "an_importer", GROUPS)
    monkeypatch.setitem(VERSIONS, "an_importer", ("numpy", metadata.version("numpy")))
    yield import_module("an_importer")
    sys.modules.pop("an_importer")
    light_imports._is_known.cache_clear()  # pyright: ignore[reportPrivateUsage] - forgets the version


def test_a_name_is_bound_to_the_real_thing_with_its_first_use(importer: ModuleType) -> None:
    import graphlib
    import wave

    assert type(importer.sound) is StandIn
    assert importer.sound.open is wave.open
    assert importer.sound is wave
    assert type(importer.TopologicalSorter) is StandIn
    importer.TopologicalSorter()
    assert importer.TopologicalSorter is graphlib.TopologicalSorter


def test_a_class_that_waits_is_told_by_isinstance(importer: ModuleType) -> None:
    from graphlib import TopologicalSorter

    waits: Any = importer.TopologicalSorter
    assert isinstance(TopologicalSorter(), waits)
    assert not isinstance(1, waits)
    assert issubclass(TopologicalSorter, waits)
    assert str(waits) == str(TopologicalSorter)


def test_a_copy_for_another_process_is_of_the_real_thing(importer: ModuleType) -> None:
    import wave

    assert copy.copy(importer.sound) is wave


def test_an_annotation_uses_nothing_and_a_subclass_does(importer: ModuleType) -> None:
    from fractions import Fraction

    assert type(importer.json) is StandIn
    assert importer.parse("[1]") == [1]
    assert importer.Half(1, 2) == Fraction(1, 2)


def test_an_error_that_waits_is_caught(importer: ModuleType) -> None:
    assert importer.take() == "nothing"


def test_what_is_not_installed_is_missed_at_once(importer: ModuleType) -> None:
    assert importer.not_installed_anywhere is None


def test_in_another_version_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "another_importer.py").write_text("import wave")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PUT_OFF, "another_importer", {"sound": ("wave",)})
    monkeypatch.setitem(VERSIONS, "another_importer", ("numpy", "0.1"))
    import wave

    assert import_module("another_importer").wave is wave
