"""The grugformer speedrun: `python -m experiments.speedrun.grugformer_20260129.grugformer_speedrun`.

`tiny` trains on what every Python carries (its library, docstrings and language reference), on a laptop's CPU,
offline, in a few minutes. To try something else, copy this file and change it.
"""

import argparse
from collections.abc import Sequence

from grug_native import (
    MODEL_PRESETS,
    GrugNativeRunConfig,
    GrugOptimizerConfig,
    GrugRunner,
    GrugTrainerConfig,
)


def build_run(size: str = "tiny", *, output_path: str | None = None) -> GrugNativeRunConfig:
    """The run of one size.

    Args:
        size: a name in `MODEL_PRESETS`.
        output_path: folder of the run; by default `runs/grugformer-SIZE`.
    """
    from grug_native.corpus import embedded_corpus

    model = MODEL_PRESETS[size]
    return GrugNativeRunConfig(
        model=model,
        data=embedded_corpus("runs/corpora", vocab_size=model.vocab_size),
        optimizer=GrugOptimizerConfig(learning_rate=3e-3, weight_decay=0.1, warmup=20),
        trainer=GrugTrainerConfig(num_train_steps=400, train_batch_size=16),
        output_path=output_path or f"runs/grugformer-{size}",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the size that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(MODEL_PRESETS), default="tiny", help="which model (default: tiny)")
    parser.add_argument("--output-path", help="folder of the run (default: runs/grugformer-SIZE)")
    arguments = parser.parse_args(argv)
    GrugRunner(build_run(arguments.size, output_path=arguments.output_path)).fit()


if __name__ == "__main__":
    main()
