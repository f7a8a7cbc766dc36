"""Exported models in `transformers`: `python -m experiments.benchmarks.weights --torch-python PYTHON`.

Models of each kind that our Llama can be, random and far from zero, are exported in f32 as `grug export` does it;
`transformers` reads them in an interpreter of its own, and answers the same tokens. Compared are logits, loss, the
greedy continuation of a prompt and the ids of a text. Then `transformers` saves the model, and a run starts from what
it saved with `trainer.init_from`: its parameters have to be the exported ones, bit for bit. Exits with 1 if anything
is too far off. torch and transformers are no dependencies: name an interpreter that has them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peers.worker import ROOT, has_torch
from grug_native import AdamWConfig, GrugNativeRunConfig, GrugRopeConfig, GrugRunner, GrugTrainerConfig, local_text_data
from grug_native.attention import Mask
from grug_native.evaluation.generate import generate
from grug_native.language_model import logits
from grug_native.loss import next_token_loss
from grug_native.model import GrugModelConfig
from grug_native.train import PlainBatch
from grug_native.weights.config import InitFrom

FARTHEST = 1e-4
"""Of logits and losses, absolute; the largest logits are about five."""
GREEDY_TOKENS = 40
PROMPT_TOKENS = 12
SEQ_LEN = 96
TEXT = "A model is exported, read elsewhere, and continues: def main(argv=None) -> int:\n    return 0  # ögg 日本"

MHA = GrugModelConfig(
    vocab_size=512,
    hidden_dim=64,
    intermediate_dim=160,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    max_seq_len=256,
    initializer_std=0.15,
)
LLAMA3 = GrugRopeConfig(theta=500_000.0, llama3_factor=8.0, original_max_seq_len=32)
KINDS = {
    "MHA": MHA,
    "GQA": replace(MHA, num_kv_heads=2, rope=GrugRopeConfig(theta=50_000.0)),
    "llama3 rope": replace(MHA, num_kv_heads=1, rope=LLAMA3),
    "tied head": replace(MHA, num_kv_heads=2, tie_embeddings=True, layer_norm_eps=1e-6),
}


@dataclass(frozen=True)
class Comparison:
    """One kind of model, here and there."""

    kind: str
    logits: float
    """Largest difference."""
    largest: float
    """Of our logits."""
    loss: float
    """Difference."""
    greedy: int
    """Tokens of the continuation that are equal, from the first on."""
    drawn: int
    """Of so many that we made."""
    same_ids: bool
    """Whether the tokenizer gives the same ids."""
    same_weights: bool
    """Whether what transformers saves comes back to the bit."""

    @property
    def fine(self) -> bool:
        """Whether all of it is as it has to be."""
        close = self.logits <= FARTHEST and self.loss <= FARTHEST
        return close and self.greedy == self.drawn and self.same_ids and self.same_weights


def main(argv: Sequence[str] | None = None) -> None:
    """Compares, prints the table, and fails if something is too far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch and transformers")
    arguments = parser.parse_args(argv)
    if not has_torch(arguments.torch_python):
        parser.error(f"{arguments.torch_python} has no torch: name an interpreter that has it with --torch-python")
    with tempfile.TemporaryDirectory() as root:
        found = list(compare(Path(root), arguments.torch_python))
    print("| model | logits | of at most | loss | greedy tokens equal | ids of a text | saved there and read back |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in found:
        words = [f"{one.logits:.1e}", f"{one.largest:.1f}", f"{one.loss:.1e}", f"{one.greedy} of {one.drawn}"]
        words += ["equal" if same else "**differ**" for same in (one.same_ids, one.same_weights)]
        print(f"| {one.kind} | {' | '.join(words)} |")
    if wrong := [one.kind for one in found if not one.fine]:
        raise SystemExit(f"too far off: {', '.join(wrong)}")


def compare(root: Path, torch_python: str) -> Iterator[Comparison]:
    """Exports all kinds, has `transformers` answer, and compares."""
    runners = {kind: _export(config, root / kind.replace(" ", "-")) for kind, config in KINDS.items()}
    folders = [Path(runner.config.output_path).parent for runner in runners.values()]
    said = subprocess.run(
        [torch_python, "-m", "experiments.benchmarks.peers.torch_hf", str(GREEDY_TOKENS), *map(str, folders)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    print(f"{said.stdout.strip()}, jax {jax.__version__}", file=sys.stderr)
    for kind, runner in runners.items():
        yield _compare_one(kind, runner)


def _export(config: GrugModelConfig, folder: Path) -> GrugRunner:
    folder.mkdir()
    data = local_text_data({"text": ROOT / "README.md"}, cache_dir=folder.parent / "corpora", vocab_size=512)
    runner = GrugRunner(
        GrugNativeRunConfig(
            model=config,
            data=data,
            optimizer=AdamWConfig(),
            trainer=GrugTrainerConfig(num_train_steps=1, train_batch_size=jax.device_count()),
            output_path=str(folder / "run"),
        )
    )
    runner.export(runner.init_state(), folder / "llama", dtype="float32")
    rng = np.random.default_rng(3)
    np.save(folder / "tokens.npy", rng.integers(1, config.vocab_size, (jax.device_count(), SEQ_LEN)))
    np.save(folder / "prompt.npy", rng.integers(1, config.vocab_size, (1, PROMPT_TOKENS)))
    (folder / "text.txt").write_text(TEXT)
    return runner


def _compare_one(kind: str, runner: GrugRunner) -> Comparison:
    folder, params = Path(runner.config.output_path).parent, runner.init_state().params
    tokens, prompt = (np.load(folder / f"{name}.npy") for name in ("tokens", "prompt"))
    theirs = np.load(folder / "theirs.npz")
    with jax.set_mesh(runner.mesh):
        ids = jnp.asarray(tokens, jnp.int32)
        batch = PlainBatch(ids, jnp.ones(ids.shape).at[:, -1].set(0.0), Mask())
        ours = np.asarray(eqx.filter_jit(logits)(params, batch.tokens, batch.attn_mask))
        loss = float(next_token_loss(params, batch)[0])
    drawn = generate(params, prompt[0].tolist(), max_new_tokens=GREEDY_TOKENS, temperature=0.0, stop_token=0)
    same = [a == b for a, b in zip(drawn, theirs["greedy"].tolist(), strict=False)]
    tokenizer = runner.config.data.the_tokenizer
    trainer = replace(runner.config.trainer, init_from=InitFrom(source=str(folder / "resaved")))
    again = GrugRunner(replace(runner.config, trainer=trainer, output_path=str(folder / "again"))).init_state()
    return Comparison(
        kind=kind,
        logits=float(np.abs(ours - theirs["logits"]).max()),
        largest=float(np.abs(ours).max()),
        loss=abs(loss - float(theirs["loss"])),
        greedy=next((n for n, equal in enumerate(same) if not equal), len(same)),
        drawn=len(drawn),
        same_ids=tokenizer.encode(TEXT) == theirs["ids"].tolist(),
        same_weights=bool(eqx.tree_equal(again.params, params)),
    )


if __name__ == "__main__":
    main()
