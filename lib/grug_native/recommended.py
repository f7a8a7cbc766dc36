"""The optimizer that is recommended for a model of a given width; no rate is typed by hand for a new size.

`experiments.benchmarks.transfer` measured it for widths from 64 to 384: see "Rates from small models" in
`experiments/benchmarks/README.md`.
"""

from grug_native.optimizer import GroupConfig, MuonConfig
from grug_native.schedule import ScheduleConfig


def recommended_optimizer(width: int) -> MuonConfig:
    """Muon, with rates of their own for embedding, head and norms.

    The rates of matrices and head go with width^-0.8, which is what tuning each of four widths came to; theory has
    width^-1 for the head of a wide model (Yang et al. 2022, arXiv 2203.03466). Those of embedding and norms stay.

    Args:
        width: of the residual stream.
    """
    scale = (128 / width) ** 0.8
    return MuonConfig(
        learning_rate=_rounded(0.0197 * scale),
        schedule=ScheduleConfig(warmup=0.2, min_lr_ratio=0.0),
        momentum=0.85,
        beta1=0.8,
        beta2=0.99,
        embedding=GroupConfig(learning_rate=0.11, weight_decay=0.0),
        head=GroupConfig(learning_rate=_rounded(0.0315 * scale), weight_decay=0.0),
        norm=GroupConfig(learning_rate=0.002, weight_decay=0.0),
    )


def recommended_in_words(width: int) -> str:
    """The same in a line, and where the numbers come from."""
    chosen = recommended_optimizer(width)
    rates = {kind: getattr(chosen, kind).learning_rate for kind in ("head", "embedding", "norm")}
    of_rest = ", ".join(f"{kind} {rate:g}" for kind, rate in rates.items())
    return (
        f"muon, rates: matrix {chosen.learning_rate:g}, {of_rest}; momentum {chosen.momentum:g}, warm-up "
        f"{chosen.schedule.warmup:.0%}, down to {chosen.schedule.min_lr_ratio:g} (for width {width}, by a rule that "
        "experiments.benchmarks.transfer measured)"
    )


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
