from typing import Any

from grug_native.parsing.old_configs import upgraded

OLD: dict[str, Any] = {
    "model": {"vocab_size": 300, "cross_entropy": "full"},
    "optimizer": {
        "kind": "muon",
        "learning_rate": 0.02,
        "adam_learning_rate": None,
        "schedule": "wsd",
        "warmup": 5,
        "decay": 0.25,
        "min_lr_ratio": 0.0,
        "weight_decay": 0.2,
        "beta1": 0.8,
        "momentum": 0.9,
        "newton_schulz_steps": 4,
        "max_grad_norm": None,
        "levanter": None,
    },
    "trainer": {"num_train_steps": 8},
}


def test_an_old_config_says_the_same_in_todays_fields() -> None:
    new = upgraded(OLD)
    assert new["model"] == {"type": "transformer", "vocab_size": 300, "tie_embeddings": False}
    assert new["trainer"] == {"num_train_steps": 8, "cross_entropy": "full"}
    optimizer = new["optimizer"]
    assert optimizer["schedule"] == {"shape": "wsd", "warmup": 5, "decay": 0.25, "min_lr_ratio": 0.0}
    kept = ("learning_rate", "weight_decay", "beta1", "momentum", "newton_schulz_steps", "max_grad_norm")
    assert {name: optimizer[name] for name in kept} == {name: OLD["optimizer"][name] for name in kept}
    assert optimizer["type"] == "muon" and optimizer["embedding"]["weight_decay"] == 0
    assert not {"kind", "levanter", "warmup"} & optimizer.keys()
    assert upgraded(new) == new


def test_of_an_optimizer_of_levanters_its_own_config_is_left() -> None:
    old = OLD["optimizer"] | {"kind": "levanter", "levanter": {"type": "adam"}}
    assert upgraded({"optimizer": old})["optimizer"] == {"type": "levanter", "levanter": {"type": "adam"}}
