"""Makes what the workers share: `python -m experiments.benchmarks.peers.inputs JOB`.

Writes our initial parameters (`weights.npz`, by dotted path), the batches (`batches.npy`) and the documents of their
packed rows (`segments.npy`), the operations a token takes (`flops.json`), and for levanter a checkpoint of the same
parameters.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peers import ours, shapes
from experiments.benchmarks.peers.shapes import Job
from grug_native.metrics import flops_per_token, parameter_counts
from grug_native.model import Transformer
from grug_native.state import init_train_state


def corpus_batches(job: Job) -> np.ndarray:
    """The first batches of `fit()`, which predict every token but the first."""
    from experiments.benchmarks.peers.ours_fit import run_config
    from grug_native import GrugRunner

    runner = GrugRunner(run_config(job))
    batches = [runner.batch(step) for step in range(job.num_batches)]
    for batch in batches:
        assert jnp.all(batch.loss_weight[:, :-1] == 1) and jnp.all(batch.loss_weight[:, -1] == 0)
        assert batch.attn_mask.segment_ids is None
    return np.stack([np.asarray(batch.tokens) for batch in batches])


def random_batches(job: Job) -> np.ndarray:
    """Ids as unequal as those of text: most are small."""
    shape = job.sizes
    draws = np.random.default_rng(shapes.SEED).random((job.num_batches, shape.batch_size, shape.seq_len))
    return (shape.vocab_size**draws - 1).astype(np.int32)


def random_segments(job: Job) -> np.ndarray:
    """Packed rows: the number of its document for each position, of three to nine documents a row."""
    shape, rng = job.sizes, np.random.default_rng(shapes.SEED + 1)

    def row() -> np.ndarray:
        cuts = rng.choice(
            np.arange(1, shape.seq_len), size=min(int(rng.integers(2, 9)), shape.seq_len - 1), replace=False
        )
        return np.searchsorted(np.sort(cuts), np.arange(shape.seq_len), side="right")

    rows = [row() for _ in range(job.num_batches * shape.batch_size)]
    return np.stack(rows).astype(np.int32).reshape(job.num_batches, shape.batch_size, shape.seq_len)


def write_levanter_weights(job: Job, params: Transformer) -> None:
    """A checkpoint for `initialize_model_from_checkpoint_path`."""
    from levanter.checkpoint import save_checkpoint

    from experiments.benchmarks.peers.levanter_llama import to_llama

    save_checkpoint({"model": to_llama(params)}, 0, f"{job.folder}/levanter-weights/step-0", is_temporary=False)


def main() -> None:
    """Writes the files of a job."""
    job = Job.read(sys.argv[1])
    config, folder = ours.model_config(job.sizes), Path(job.folder)
    params = init_train_state(config, ours.optimizer(), key=jax.random.key(shapes.SEED)).params
    named = {jax.tree_util.keystr(path)[1:]: np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    np.savez(folder / "weights.npz", **named)  # pyright: ignore[reportArgumentType]  # its other keyword is a bool
    np.save(folder / "batches.npy", corpus_batches(job) if job.data == "corpus" else random_batches(job))
    np.save(folder / "segments.npy", random_segments(job))
    flops = flops_per_token(config, job.sizes.seq_len)._asdict()
    if job.levanter_weights:
        assert isinstance(params, Transformer)
        write_levanter_weights(job, params)
    # Last, for it says that the others are there.
    (folder / "flops.json").write_text(json.dumps(flops | {"parameters": parameter_counts(config)["total"]}))


if __name__ == "__main__":
    main()
