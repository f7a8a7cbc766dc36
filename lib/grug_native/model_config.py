"""Shape and kernels of the model as plain data, the sizes of the speedrun, and what is chosen by device and memory."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from grug_native.attention import ATTENTION_NAMES, AttentionName
from grug_native.backend import Backend
from grug_native.rotary import GrugRopeConfig

CrossEntropyName = Literal["auto", "full", "blockwise"]
"""A cross-entropy implementation; see `grug_native.loss`."""

RematName = Literal["auto", "none", "dots", "full"]
"""What the backward pass recomputes: nothing, all but matrix products, or whole blocks; `auto` as memory allows."""

_MOST_UNROLLED_LAYERS: dict[str, int] = {"cpu": 48, "gpu": 48, "tpu": 8}
"""Unrolled layers run faster (of a 124M model on an H200 by 27%), and compile longer (there 24 of them in 14 s)."""


@dataclass(frozen=True, kw_only=True)
class GrugModelConfig:
    """Shape and kernels of a `Transformer`. Sizes are counts; nothing here needs a device."""

    vocab_size: int
    """Rows of the embedding: every token id is below it."""
    hidden_dim: int
    """Features of the residual stream (D)."""
    intermediate_dim: int
    """Features inside the MLP (F)."""
    num_layers: int
    """Blocks (L)."""
    num_heads: int
    """Query heads (H)."""
    num_kv_heads: int
    """Key/value heads (N); divides `num_heads`. Equal to it for multi-head attention."""
    max_seq_len: int
    """Longest sequence, in tokens."""
    head_dim: int | None = None
    """Features of a head (E), even. None means `hidden_dim // num_heads`."""
    layer_norm_eps: float = 1e-5
    """Added to the mean square inside each RMSNorm."""
    initializer_std: float = 0.02
    """Standard deviation of the truncated normal that fills every matrix."""
    rope: GrugRopeConfig = GrugRopeConfig()
    """Rotary embeddings."""
    attention: AttentionName = "auto"
    """Attention kernel, by name."""
    cross_entropy: CrossEntropyName = "auto"
    """Cross-entropy kernel, by name."""
    remat: RematName = "auto"
    """What the backward pass recomputes; see `choose_remat`."""
    scan_layers: bool | Literal["auto"] = "auto"
    """One compiled block in a loop (compiles fast, for deep models), or the blocks unrolled (runs faster); `auto` scans
    where there are many of them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, int | None) and value is not None and value <= 0:
                raise ValueError(f"model.{field.name}={value} must be positive")
        if self.head_dim is None and self.hidden_dim % self.num_heads != 0:
            raise ValueError(
                f"model.hidden_dim={self.hidden_dim} is not divisible by model.num_heads={self.num_heads}: "
                "choose a divisor, or set model.head_dim"
            )
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}: "
                "each key/value head serves a whole number of query heads"
            )
        if self.features_per_head % 2 != 0:
            raise ValueError(f"model.head_dim={self.features_per_head} must be even: rotary embeddings turn pairs")
        for name, value, known in (
            ("attention", self.attention, ATTENTION_NAMES),
            ("cross_entropy", self.cross_entropy, get_args(CrossEntropyName)),
            ("remat", self.remat, get_args(RematName)),
        ):
            if value not in known:
                raise ValueError(f"model.{name}={value!r} is unknown: choose one of {', '.join(known)}")
        if self.scan_layers not in (True, False, "auto"):
            raise ValueError(f"model.scan_layers={self.scan_layers!r} is unknown: choose one of true, false, auto")

    @property
    def features_per_head(self) -> int:
        """Features of a head (E), resolved."""
        return self.hidden_dim // self.num_heads if self.head_dim is None else self.head_dim


def choose_scan(config: GrugModelConfig, backend: Backend) -> tuple[bool, str]:
    """Resolves `scan_layers`, and gives the reason in words."""
    if config.scan_layers != "auto":
        return config.scan_layers, "asked for by the config"
    most = _MOST_UNROLLED_LAYERS[backend.name]
    if config.num_layers > most:
        return True, f"more than {most} layers take long to compile one by one"
    return False, "run faster than scanned ones"


def choose_remat(config: GrugModelConfig, backend: Backend, *, tokens: int, shards: int) -> tuple[RematName, str]:
    """Resolves `remat`, and gives the reason in words: the least that, by an estimate, lets a step fit into the device.

    Args:
        config: of the model.
        backend: whose memory counts. Where it does not tell, nothing is recomputed.
        tokens: of a batch, on one device.
        shards: devices over which parameters and optimizer state are split.
    """
    if config.remat != "auto":
        return config.remat, "asked for by the config"
    if backend.memory is None:
        return "none", "all activations are kept"
    state = _STATE_BYTES * _num_parameters(config) // shards
    room = int(_USABLE_MEMORY * backend.memory) - state
    need = {name: tokens * _activation_bytes(config, name) for name in ("none", "dots", "full")}
    for name in ("none", "dots"):
        if need[name] <= room:
            return name, f"{need[name] / 2**30:.1f} GiB of activations, and {room / 2**30:.1f} GiB beside the state"
    return "full", f"to keep all activations would take {need['none'] / 2**30:.1f} GiB, of {room / 2**30:.1f}"


_STATE_BYTES = 20
"""Of a parameter: itself, two moments and its gradient in f32, and room for its copy in bf16 and for its average."""
_USABLE_MEMORY = 0.85
"""Share of a device's memory; the rest is for the logits, a block's own work, and what fragments."""


def _num_parameters(config: GrugModelConfig) -> int:
    heads, kv_heads = (n * config.features_per_head for n in (config.num_heads, config.num_kv_heads))
    layer = config.hidden_dim * (2 * heads + 2 * kv_heads + 3 * config.intermediate_dim)
    return 2 * config.vocab_size * config.hidden_dim + config.num_layers * layer


def _activation_bytes(config: GrugModelConfig, remat: RematName) -> int:
    """What the forward pass keeps of a token in all layers, in bf16; attention keeps no scores."""
    heads, kv_heads = (n * config.features_per_head for n in (config.num_heads, config.num_kv_heads))
    products = 2 * heads + 2 * kv_heads + 2 * config.hidden_dim + 2 * config.intermediate_dim
    kept = {
        "none": products + heads + 2 * kv_heads + 6 * config.hidden_dim + 3 * config.intermediate_dim,
        "dots": products + config.hidden_dim,
        "full": config.hidden_dim,
    }
    return 2 * config.num_layers * kept[remat]


MODEL_PRESETS: dict[str, GrugModelConfig] = {
    name: GrugModelConfig(
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
        intermediate_dim=intermediate_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        max_seq_len=max_seq_len,
    )
    for name, (vocab_size, hidden_dim, intermediate_dim, num_layers, num_heads, max_seq_len) in {
        "tiny": (4096, 128, 448, 4, 4, 256),
        "130m": (128_256, 512, 1792, 6, 8, 2048),
        "300m": (128_256, 768, 2688, 12, 12, 2048),
        "520m": (128_256, 1024, 3584, 24, 16, 2048),
        "1_2b": (128_256, 2048, 7168, 16, 16, 2048),
    }.items()
}
"""The speedrun's sizes (Llama 3 vocabulary), and `tiny`, which a laptop's CPU trains in minutes."""
