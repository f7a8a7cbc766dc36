"""Harness against forward pass, in tokens per second: `python -m experiments.benchmarks.harness_throughput`.

The harness gets texts: it tokenizes, packs, scores and sums. The forward pass is the loss of full rows that are on the
device already. Both have the same model, rows and mesh. They take turns, so that a busy machine slows both.
"""

import argparse
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from levanter.data.text.examples import GrugLmExample
from levanter.grug.attention import AttentionMask
from lm_eval.api.instance import Instance

from grug_native import MODEL_PRESETS
from grug_native.data.corpus import embedded_corpus
from grug_native.data.python_texts import read_stdlib
from grug_native.evaluation.harness_lm import GrugLM
from grug_native.evaluation.scoring import Scorer, pack
from grug_native.loss import ComputeDtype, per_token_loss
from grug_native.model import Transformer
from grug_native.sharding import batch_sharding, create_mesh

forward = jax.jit(per_token_loss, static_argnames="compute_dtype")


def make_requests(number: int, row_length: int, seed: int = 0) -> list[Instance]:
    """Pieces of the standard library: contexts of up to twice a row, continuations of a token to a quarter of a row."""
    rng, texts = random.Random(seed), [text for text in read_stdlib().values() if len(text) > 20_000]
    pairs: list[tuple[str, str]] = []
    for _ in range(number):
        # Some three characters to a token.
        context, own = (int(3 * row_length * share) for share in (2 * rng.random() ** 3, rng.random() ** 2 / 4))
        text = rng.choice(texts)
        start = rng.randrange(len(text) - context - own - 4)
        pairs.append((text[start : start + context], text[start + context : start + context + own + 4]))
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=("benchmark", index, 1))
        for index, pair in enumerate(pairs)
    ]


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny", choices=MODEL_PRESETS)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=16, help="of a forward pass, over all devices")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/corpora"))
    arguments = parser.parse_args()

    preset = MODEL_PRESETS[arguments.size]
    tokenizer = embedded_corpus(arguments.cache_dir).the_tokenizer
    dtype: ComputeDtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    mesh, rows, length = create_mesh(arguments.rows), arguments.rows, preset.max_seq_len
    with jax.set_mesh(mesh):
        config = replace(preset, vocab_size=len(tokenizer))
        params = jax.jit(lambda key: Transformer.init(config, key=key))(jax.random.key(0))
        weight = np.ones((rows, length), np.float32)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).astype(np.int32)
        batch = jax.device_put(
            GrugLmExample(jnp.asarray(tokens), jnp.asarray(weight), AttentionMask.causal()), batch_sharding(mesh)
        )
    scorer = Scorer(params, mesh, length, rows, dtype)
    requests = make_requests(arguments.requests, length)

    def time_forward(passes: int) -> float:
        started = time.perf_counter()
        with jax.set_mesh(mesh):
            losses = [forward(params, batch, compute_dtype=dtype) for _ in range(passes)]
        jax.block_until_ready(losses)
        return passes * rows * length / (time.perf_counter() - started)

    def time_harness() -> tuple[float, int]:
        model = GrugLM(scorer, tokenizer)
        started = time.perf_counter()
        model.loglikelihood(requests)
        return model.tokens / (time.perf_counter() - started), model.tokens

    time_forward(1)
    _, useful = time_harness()
    passes = max(1, useful // (rows * length))
    rounds = [(time_forward(passes), time_harness()[0]) for _ in range(arguments.rounds)]
    dense, packed = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(harness / forward for forward, harness in rounds)
    lengths = [min(len(ids) - 1, length) for ids in tokenizer.encode_batch(["".join(r.args) for r in requests])]
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {arguments.size}, {rows} rows of {length}, {dtype}")
    print(f"requests           {len(requests)}, {useful} positions")
    print(f"useful positions   {pack(lengths, length).efficiency(length):.1%} of a packed row")
    print(f"forward pass       {dense:,.0f} tokens/s")
    print(f"harness            {packed:,.0f} tokens/s")
    print(f"harness / forward  {ratio:.2f} (median of {arguments.rounds} rounds)")


if __name__ == "__main__":
    main()
