# pyright: basic
# (torch is not in the environment, so nothing of it has a type.)
"""The same Llama in PyTorch, eager or compiled, by an interpreter that has torch and NumPy.

`python -m experiments.benchmarks.peers.torch_llama JOB eager|compile [packed]`, from the root of the repository. Fused
attention (on packed rows FlexAttention, and on a CPU, where that has no gradient, a mask of booleans) and fused AdamW;
f32 on a CPU, bf16 autocast and f32 parameters on CUDA. `Turn.calls` is the time from a step's call to its return; the
host waits for the device at the end of a turn only.
"""

import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # noqa: TID251 - a peer, run by an interpreter of its own
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]  # noqa: TID251 - as above
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]  # noqa: TID251 - as above
    BlockMask,
    create_block_mask,
    flex_attention,
)

from experiments.benchmarks.peers import shapes
from experiments.benchmarks.peers.gate import Gate
from experiments.benchmarks.peers.shapes import Job, Shape


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation, fused."""

    def __init__(self, dim: int):
        """Makes the weight."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), shapes.NORM_EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split convention; `x` is (batch, heads, positions, features)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


Mask = BlockMask | torch.Tensor | None
"""Who sees whom; None for all before."""


def packed_mask(documents: torch.Tensor) -> Mask:
    """Each position sees those before it in its own document; `documents` is (batch, positions)."""
    batch, positions = documents.shape
    if not documents.is_cuda:
        same = documents[:, :, None] == documents[:, None, :]
        return same.tril()[:, None]

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    return create_block_mask(sees, batch, None, positions, positions, device=documents.device, _compile=True)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Fused attention; all are (batch, heads, positions, features)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class Block(torch.nn.Module):
    """Attention and SwiGLU, each behind a norm."""

    def __init__(self, shape: Shape):
        """Makes the weights."""
        super().__init__()
        d, f = shape.hidden_dim, shape.intermediate_dim
        self.num_heads = shape.num_heads
        self.attn_norm, self.mlp_norm = RMSNorm(d), RMSNorm(d)
        self.wq, self.wk, self.wv, self.wo = (torch.nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = (torch.nn.Linear(d, f, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(f, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: Mask) -> torch.Tensor:
        """The residual stream after the layer."""
        batch, positions, dim = x.shape
        normed = self.attn_norm(x)
        q, k, v = (
            linear(normed).view(batch, positions, self.num_heads, -1).transpose(1, 2)
            for linear in (self.wq, self.wk, self.wv)
        )
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
        x = x + self.wo(mixed.transpose(1, 2).reshape(batch, positions, dim))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(torch.nn.Module):
    """The whole model, and its loss."""

    def __init__(self, shape: Shape):
        """Makes the weights."""
        super().__init__()
        self.embed = torch.nn.Embedding(shape.vocab_size, shape.hidden_dim)
        self.blocks = torch.nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.final_norm = RMSNorm(shape.hidden_dim)
        self.lm_head = torch.nn.Linear(shape.hidden_dim, shape.vocab_size, bias=False)
        half = shape.hidden_dim // shape.num_heads // 2
        frequency = shapes.ROPE_THETA ** -(torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(shape.seq_len, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, mask: Mask = None) -> torch.Tensor:
        """Mean nats a predicted token; targets of -100 are left out."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, mask)
        logits = self.lm_head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def load_weights(model: Llama, folder: str) -> None:
    """Our initial weights; matrices of ours are (in, out) and stacked over the layers."""
    ours = np.load(f"{folder}/weights.npz")

    def fill(parameter: torch.nn.Parameter, value: np.ndarray) -> None:
        assert parameter.shape == value.shape
        parameter.copy_(torch.from_numpy(value))

    with torch.no_grad():
        fill(model.embed.weight, ours["embed"])
        fill(model.lm_head.weight, ours["lm_head"].T)
        fill(model.final_norm.weight, ours["final_norm.weight"])
        for name in ("wq", "wk", "wv", "wo", "gate", "up", "down"):
            stacked = ours[f"blocks.{'attn' if name.startswith('w') else 'mlp'}.{name}"]
            for block, matrix in zip(model.blocks, stacked, strict=True):
                fill(getattr(block, name).weight, matrix.T)
        for name in ("attn_norm", "mlp_norm"):
            for block, vector in zip(model.blocks, ours[f"blocks.{name}.weight"], strict=True):
                fill(getattr(block, name).weight, vector)


def main() -> None:
    """Trains until the parent has enough."""
    job, mode, packed = Job.read(sys.argv[1]), sys.argv[2], "packed" in sys.argv
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    about = {
        "platform": device.type,
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        **({"packed": "FlexAttention" if cuda else "mask of booleans"} if packed else {}),
    }
    gate = Gate(
        torch.cuda.synchronize if cuda else lambda: None,
        lambda: torch.cuda.max_memory_allocated() if cuda else None,
        about,
    )
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    model = Llama(job.sizes)
    load_weights(model, job.folder)
    model.to(device)
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("embed")]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or name.startswith("embed")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": shapes.WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=shapes.LEARNING_RATE,
        betas=shapes.BETAS,
        eps=shapes.EPSILON,
        fused=True,
    )
    loss_of = torch.compile(model) if mode == "compile" else model
    all_tokens = torch.from_numpy(np.load(f"{job.folder}/batches.npy")).long().to(device)
    documents = torch.from_numpy(np.load(f"{job.folder}/segments.npy")).to(device) if packed else None
    for step, tokens in enumerate(all_tokens):
        targets = tokens.roll(-1, dims=1)
        targets[:, -1] = -100
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = loss_of(tokens, targets, None if documents is None else packed_mask(documents[step]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shapes.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0 and cuda:
            torch.cuda.synchronize()
        gate.step_done(loss.detach(), time.perf_counter() - started)


if __name__ == "__main__":
    main()
