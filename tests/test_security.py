"""What the sources of the library must not hold, read from their syntax trees."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import grug_native
from grug_native.config import GrugNativeRunConfig, config_to_dict
from grug_native.levanter_optimizer import LevanterOptimizer
from grug_native.model import GrugModelConfig
from grug_native.optimizer import AdamWConfig, LionConfig, MuonConfig
from tests.fixtures_run import MakeRun

LIBRARY = Path(str(grug_native.__file__)).parent
RUNS_WHAT_IT_LOADS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}
EXECUTES = {"eval", "exec", "compile", "__import__", "breakpoint"}
"""Builtins: called by their bare name, and not as a method such as `lowered.compile`."""


def trees() -> Iterator[tuple[Path, ast.AST]]:
    paths = sorted(LIBRARY.rglob("*.py"))
    assert len(paths) > 30
    for path in paths:
        yield path, ast.parse(path.read_text())


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def offences(node: ast.AST) -> Iterator[str]:
    yield from (name for name in imported(node) if name.split(".")[0] in RUNS_WHAT_IT_LOADS)
    if isinstance(node, ast.Attribute) and node.attr in {
        "as_hf_tokenizer",
        "AutoTokenizer",
        "unsafe_load",
        "full_load",
    }:
        yield node.attr
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in EXECUTES:
            yield node.func.id
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in {"yaml.load", "os.system", "np.load"}:
            yield ast.unparse(node.func)
        for keyword in node.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if (
                keyword.arg in {"allow_pickle", "trust_remote_code", "shell", "confirm_run_unsafe_code"}
                and not harmless
            ):
                yield f"{keyword.arg}={ast.unparse(keyword.value)}"


def test_nothing_is_unpickled_evaluated_or_trusted() -> None:
    found = [(path.name, offence) for path, tree in trees() for node in ast.walk(tree) for offence in offences(node)]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "yaml.load(text)",
        "np.load(file, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)",
        "eval(text)",
        "tokenizer.as_hf_tokenizer()",
    ],
)
def test_the_test_above_would_see_it(source: str) -> None:
    assert [offence for node in ast.walk(ast.parse(source)) for offence in offences(node)]


@pytest.mark.parametrize("run_id", ["../x", "/abs", "a/b", "a\0b", "..", ".hidden", "", "x" * 181, "%2e%2e/x"])
def test_a_run_s_name_cannot_lead_out_of_its_folder(run_id: str, make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match=r"trainer\.run_id="):
        make_run(trainer={"run_id": run_id})


def test_the_config_has_no_field_for_a_secret() -> None:
    from dataclasses import fields, is_dataclass

    def names(kind: object) -> Iterator[str]:
        for item in fields(kind) if isinstance(kind, type) and is_dataclass(kind) else ():
            yield item.name
            yield from names(item.type)

    kinds = (GrugNativeRunConfig, GrugModelConfig, AdamWConfig, MuonConfig, LionConfig, LevanterOptimizer)
    found = {name for kind in kinds for name in names(kind)}
    assert len(found) > 50
    assert [n for n in found if any(word in n for word in ("key", "secret", "password", "credential", "auth"))] == []


def test_a_password_in_a_url_is_refused_and_not_repeated(make_run: MakeRun) -> None:
    config = make_run()
    data = replace(config.data, tokenizer="https://me:hunter2@example.org/tokenizer")
    with pytest.raises(ValueError, match=r"a URL of example\.org with a password") as refusal:
        config_to_dict(replace(config, data=data))
    assert "hunter2" not in str(refusal.value)
    tokenizer = "https://example.org/a:b@c"
    assert config_to_dict(replace(config, data=replace(data, tokenizer=tokenizer)))["data"]["tokenizer"] == tokenizer
