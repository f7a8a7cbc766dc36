"""What a run must never write down, and code that it must never run, at the level of whole runs."""

import json
from pathlib import Path

import yaml

from tests.faults.runs import ForkServer, Run

CANARY = "canary7f3a9c51e2d84b60a1c3e5f7092b4d6e8f0a1b2c"
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AUTHORIZATION", "COOKIE", "MY_OWN_PASSWORD")


def test_no_secret_of_the_environment_is_written_down(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "wandb-offline"
    folder.mkdir()
    environment = dict.fromkeys(SECRETS, CANARY) | {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    run.edit({"trainer.trackers": [{"type": "wandb", "mode": "offline", "project": "grug"}]})
    said = run.fit(environment=environment, stop_after=3).expect(0)
    files = [path for root in (run.folder, folder) for path in root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files), said
    assert (run.folder / "config.yaml") in files
    assert CANARY not in said
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_tokenizer_s_code_is_not_run(server: ForkServer, run: Run, tmp_path: Path) -> None:
    """What `trust_remote_code` would import: a module beside the tokenizer that its config asks for."""
    tokenizer = Path(yaml.safe_load(run.config.read_text())["data"]["tokenizer"])
    evil = tmp_path / "tokenizer"
    evil.mkdir()
    for path in tokenizer.iterdir():
        (evil / path.name).write_bytes(path.read_bytes())
    config = evil / "tokenizer_config.json"
    settings = json.loads(config.read_text()) if config.exists() else {}
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    config.write_text(json.dumps(settings | {"tokenizer_class": "EvilTokenizer", "auto_map": auto_map}))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nclass EvilTokenizer: ...\n")
    run.edit({"data.tokenizer": str(evil)})
    run.fit(stop_after=1, environment={"HF_TRUST_REMOTE_CODE": "1"}).expect(0)
    assert not (tmp_path / "executed").exists()
