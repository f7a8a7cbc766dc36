"""Configs as an earlier version wrote them, into config files and checkpoints, in today's fields."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any


def upgraded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a config, in today's fields; one that has them already is left as it is.

    Until a head could be tied to the embedding, none was. Until there was a class for each optimizer, `optimizer.kind`
    named it, among the fields of all of them; the cross-entropy was named by the model.
    """
    sections = dict(raw)
    model, optimizer = sections.get("model"), sections.get("optimizer")
    if isinstance(model, Mapping) and "cross_entropy" in model:
        sections["model"] = {"type": "transformer"} | {k: v for k, v in model.items() if k != "cross_entropy"}
        sections["trainer"] = {"cross_entropy": model["cross_entropy"]} | sections.get("trainer", {})
    model = sections.get("model")
    if isinstance(model, Mapping) and model.get("type") == "transformer":
        sections["model"] = {"tie_embeddings": False, **model}
    if isinstance(optimizer, Mapping) and "kind" in optimizer:
        sections["optimizer"] = _optimizer(optimizer)
    return sections


def _optimizer(old: Mapping[str, Any]) -> dict[str, Any]:
    from grug_native.optimizer import AdamWConfig, LionConfig, MuonConfig  # With jax, which `grug ckpt` does without.

    kind = old["kind"]
    default = {"adamw": AdamWConfig, "lion": LionConfig, "muon": MuonConfig}.get(kind)
    if default is None:
        return {"type": kind, "levanter": old.get("levanter")}
    usual = asdict(default())
    schedule = {name: old[name] for name in ("warmup", "decay", "min_lr_ratio") if name in old}
    if "schedule" in old:
        schedule["shape"] = old["schedule"]
    kept = {name: value for name, value in old.items() if name in usual and name != "schedule"}
    return {"type": kind} | usual | kept | {"schedule": usual["schedule"] | schedule}
