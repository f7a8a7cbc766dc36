"""A run worked out in advance: plain data, and its table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, NamedTuple, override

from grug_native.data.corpus_store import Counts, describe_counts
from grug_native.kernels.choices import Choice
from grug_native.language_model import FlopsPerToken
from grug_native.optimizer import ParamGroup

if TYPE_CHECKING:
    from rich.table import Table

type MixtureStages = tuple[tuple[int, Mapping[str, float]], ...]
"""Pairs of (first step, share of each component)."""


class MemoryUse(NamedTuple):
    """Bytes that the compiled train step takes on each device."""

    state: int
    """Parameters, optimizer state and batch: what goes in."""
    working: int
    """Activations, gradients and other temporaries."""
    peak: int
    """All of it at the worst moment; the prefetched batches are not among it."""


class Timing(NamedTuple):
    """What was measured over a few steps."""

    compile_seconds: float
    """From tracing to the end of the first step."""
    step_seconds: float
    """Median of the steps after it."""
    tokens_per_second: float
    """Over all devices."""
    train_seconds: float
    """Expected of all steps of the run, without evaluations and saves."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RunPlan:
    """A run worked out in advance. It prints as a table, and every number of the table is a field."""

    run_id: str
    """Name of the run."""
    output_path: str
    """Its folder."""
    resumes_from: int | None
    """Newest committed step in the folder; None for a fresh run."""
    starts_with: str | None
    """Which parameters are loaded; None if they are drawn."""
    parameters: Mapping[str, int]
    """Parameters by module, and their `total`."""
    routing: tuple[ParamGroup, ...]
    """What the optimizer does to each parameter."""
    learning_rates: tuple[tuple[int, float], ...]
    """Learning rate at some steps of the schedule."""
    recommended: str | None
    """The optimizer that is recommended for this width, in words; None for a model without an embedding."""
    flops_per_token: FlopsPerToken
    """Operations of a training token, under both conventions."""
    total_flops: float
    """Operations of the whole run, attention counted over the whole square."""
    steps: int
    """Updates."""
    tokens: int
    """Token positions of the whole run."""
    batch_stages: tuple[tuple[int, int], ...]
    """Pairs of (first step, sequences)."""
    seq_len: int
    """Tokens of a sequence."""
    mixture: MixtureStages
    """Shares of the data's components."""
    corpus: Counts | None
    """Documents, bytes and tokens of the data, trained on and held out; None if they are no corpus of ours."""
    mesh: Mapping[str, int]
    """Devices along each mesh axis."""
    device: str
    """What the devices are."""
    shardings: Mapping[str, str]
    """Mesh axes over which each parameter is split, dimension by dimension, as in `-, data, model`."""
    choices: tuple[Choice, ...]
    """Kernels and dtypes, and why."""
    checkpoint_bytes: int
    """Of one checkpoint."""
    disk_needed: int
    """Bytes of the checkpoints still to be written, with a temporary one and a margin."""
    disk_free: int | None
    """Bytes that the disk of the run's folder has left; None for a bucket, which does not tell."""
    vocabulary: int | None
    """Tokens of the tokenizer; None if it is not at hand."""
    memory: MemoryUse | None
    """Of the compiled step; None unless asked for, and where the backend does not tell."""
    timing: Timing | None
    """Of a few steps; None unless asked for."""

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens seen for each parameter; about 20 is what Hoffmann et al. 2022 (arXiv 2203.15556) call optimal."""
        return self.tokens / self.parameters["total"]

    @property
    def in_a_line(self) -> str:
        """The sizes, in a line."""
        sequences = " then ".join(str(size) for _, size in self.batch_stages)
        return (
            f"{self.run_id}: {self.parameters['total']:,} parameters, {self.steps:,} steps of {sequences} x "
            f"{self.seq_len} tokens ({self.tokens_per_parameter:.1f} a parameter), on {self.device}"
        )

    def __rich__(self) -> "Table":
        """The table, for rich."""
        from rich.table import Table

        table = Table("what", "value", title=f"{self.run_id} in {self.output_path}", show_header=False, min_width=80)
        for section in (_sizes(self), _optimization(self), _data(self), _hardware(self), _costs(self)):
            for what, value in section:
                table.add_row(what, value)
            table.add_section()
        return table

    @override
    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=110).print(self)
        return text.getvalue()

    __repr__ = __str__


type _Rows = Iterator[tuple[str, str]]


def _sizes(plan: RunPlan) -> _Rows:
    total = plan.parameters["total"]
    for name, count in plan.parameters.items():
        yield ("parameters" if name == "total" else f"  {name}"), f"{count:,}  {count / total:.1%}"
    words = "" if plan.vocabulary is None else f" (the tokenizer has {plan.vocabulary:,} tokens)"
    yield "sequence", f"{plan.seq_len:,} tokens{words}"


def _optimization(plan: RunPlan) -> _Rows:
    for route in plan.routing:
        split = plan.shardings[route.path]
        yield f"  {route.path.lstrip('.')}", f"{list(route.shape)} over ({split}): {route.group}"
    yield "learning rate", ", ".join(f"{rate:.2e} at {step}" for step, rate in plan.learning_rates)
    if plan.recommended is not None:
        yield "recommended", plan.recommended


def _data(plan: RunPlan) -> _Rows:
    went_on = "" if plan.resumes_from is None else f", goes on from step {plan.resumes_from:,}"
    yield "steps", f"{plan.steps:,}{went_on}"
    if plan.starts_with is not None:
        yield "starts with", plan.starts_with
    stages = "; ".join(f"{size:,} sequences from step {start:,}" for start, size in plan.batch_stages)
    yield "batch", stages
    yield "tokens", f"{plan.tokens:,}, {plan.tokens_per_parameter:.1f} a parameter"
    for start, shares in plan.mixture:
        yield f"mixture from step {start:,}", ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    if plan.corpus is not None:
        for domain, described in describe_counts(plan.corpus).items():
            yield f"text of {domain}", described


def _hardware(plan: RunPlan) -> _Rows:
    yield "devices", plan.device
    yield "mesh", " x ".join(f"{name}={size}" for name, size in plan.mesh.items())
    for choice in plan.choices:
        yield choice.what, f"{choice.name}: {choice.reason}"


def _costs(plan: RunPlan) -> _Rows:
    flops = plan.flops_per_token
    yield "FLOPs a token", f"{flops.full:.3g} ({flops.causal:.3g} counting the causal half of attention)"
    yield "FLOPs in all", f"{plan.total_flops:.3g}"
    yield "checkpoint", _bytes(plan.checkpoint_bytes)
    free = "in a bucket" if plan.disk_free is None else f"{_bytes(plan.disk_free)} free"
    yield "disk", f"{_bytes(plan.disk_needed)} needed, {free}"
    if plan.memory is None:
        yield "memory", "known once compiled: compile=True, or --compile"
    else:
        state, working, peak = map(_bytes, plan.memory)
        yield "memory of a device", f"{peak} at most: {state} of state and batch, {working} of temporaries"
    if plan.timing is None:
        yield "time", "known once measured: measure=5, or --measure 5"
    else:
        timing = plan.timing
        speed = f"{timing.tokens_per_second:,.0f} tokens/s, {timing.step_seconds:.3g} s a step"
        yield "time", f"{_duration(timing.train_seconds)}: {speed}, {timing.compile_seconds:.1f} s to compile"


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
