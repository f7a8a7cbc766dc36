"""What the contenders have in common, in the standard library only: torch has an interpreter of its own."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama with multi-head attention and an untied head, and of its batches."""

    vocab_size: int
    """Rows of the embedding (V)."""
    hidden_dim: int
    """Features of the residual stream (D)."""
    intermediate_dim: int
    """Features inside an MLP (F)."""
    num_layers: int
    """Blocks (L)."""
    num_heads: int
    """Heads of queries, keys and values (H)."""
    seq_len: int
    """Tokens of a sequence (S)."""
    batch_size: int
    """Sequences of a step (B)."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.seq_len


def _shape(v: int, d: int, f: int, layers: int, h: int, s: int, b: int) -> Shape:
    return Shape(
        vocab_size=v, hidden_dim=d, intermediate_dim=f, num_layers=layers, num_heads=h, seq_len=s, batch_size=b
    )


SHAPES = {
    "CPU-S": _shape(8192, 512, 1408, 6, 8, 512, 8),
    "CPU-V": _shape(50_304, 512, 1408, 6, 8, 512, 8),
    "G-124M": _shape(50_304, 768, 2048, 12, 12, 1024, 16),
    "G-1.3B": _shape(128_256, 2048, 5632, 24, 16, 2048, 8),
    "CPU-R": _shape(1024, 128, 352, 2, 4, 128, 16),
    "toy": _shape(512, 64, 128, 2, 2, 64, 4),
    "host": _shape(512, 8, 16, 1, 1, 8, 2),
}
"""`CPU-R` is the model of the studies of optimizers. `toy` is for the tests. `host` computes next to nothing: its step
is what a contender does on the host."""

ROPE_THETA = 10_000.0
NORM_EPS = 1e-5
LEARNING_RATE = 3e-4
"""Constant: no schedule can differ."""
WEIGHT_DECAY = 0.1
"""On the matrices of the blocks and the head, for all contenders."""
BETAS = (0.9, 0.95)
EPSILON = 1e-8
MAX_GRAD_NORM = 1.0
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the workers of a comparison share: files in a folder, and these settings in its `job.json`."""

    folder: str
    """Of `weights.npz` and `batches.npy`."""
    shape: str
    """One of `SHAPES`."""
    num_batches: int
    """At hand in `batches.npy`; none of the contenders takes more steps."""
    data: Literal["corpus", "random"]
    """`corpus`: the embedded corpus from levanter's token cache; `random`: ids that need no data stack."""
    corpora: str
    """Folder of the corpora."""
    cpu_devices: int
    """Our CPU devices; the other contenders have one."""
    model: dict[str, Any]
    """Fields of our model's config that differ from its defaults: kernels, recomputation."""
    levanter_weights: bool
    """Whether levanter starts from our weights, and not from its own."""

    @property
    def sizes(self) -> Shape:
        """Its sizes."""
        return SHAPES[self.shape]

    def write(self) -> Path:
        """Writes `job.json`, for `read`."""
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    @staticmethod
    def read(path: str) -> "Job":
        """Reads what `write` wrote."""
        return Job(**json.loads(Path(path).read_text()))
