"""The run as a step of Marin's executor: here in this process, or as a job of an Iris cluster through Fray.

A step is `name@version`. A `dev` version belongs to the user, runs again each time, and goes on from its newest
checkpoint; a dated one (`YYYY.MM.DD`) runs once and is then served from disk. Nothing is pickled on the way to a
cluster: a job is `python -m grug_native.launch.job --config=FILE`, its folder being on a disk that all machines share.

Importing this module imports marin and levanter, which takes ten seconds.
"""

import logging
import os
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from fray.current_client import current_client, set_current_client
from fray.local_backend import LocalClient
from fray.types import Entrypoint, JobRequest, ResourceConfig, create_environment
from levanter.data.text.datasets import LmDataConfig
from marin.execution.artifact import Artifact, is_mutable_version, read_record
from marin.execution.lazy import ArtifactStep, StepContext, lower
from marin.execution.remote import sanitize_job_name
from marin.execution.step_runner import StepRunner
from marin.execution.step_status import STATUS_SUCCESS, StatusFile
from marin.experiment.namespacing import user_namespaced_name
from marin.training.run_environment import extras_for_resources
from rigging.filesystem.cluster_config import DataConfig, use_data_config

from grug_native.bucket.place import checkpoints_of, write_file
from grug_native.checkpoint.metadata import RECORDED_ENVIRONMENT
from grug_native.config import GrugNativeRunConfig, config_to_dict
from grug_native.data.corpus import embedded_corpus, local_text_data
from grug_native.data.corpus_store import read_counts
from grug_native.data.text_files import Paths
from grug_native.host.run_folder import is_bucket, local_path
from grug_native.host.signals import StopSignal
from grug_native.launch.job import train_to_results
from grug_native.launch.summary import RunResults, read_results

PREFIX_VARIABLE = "MARIN_PREFIX"
"""Environment variable that names the folder under which all steps keep what they make."""

DEFAULT_PREFIX = "runs"
"""Where steps keep what they make when nothing says otherwise, under the working directory."""

_TASK_RETRIES = 3
_FAILED_TASKS = 10
_KNOCK_SECONDS = 10

logger = logging.getLogger(__name__)


class GrugRun(Artifact):
    """A finished training run, in the numbers of `RunResults`; `path` is its folder."""

    run_id: str
    """Name of the run."""
    config_hash: str
    """SHA-256 of the resolved config, but for where things are and the run's name."""
    parameters: int
    """Weights of the model."""
    steps: int
    """Updates done."""
    tokens: int
    """Token positions trained on."""
    model_flops: float
    """Floating-point operations of the whole training."""
    first: dict[str, float]
    """First value of each loss, bits per byte and task score, by metric name."""
    final: dict[str, float]
    """Last value of the same."""
    training_seconds: float
    """Time of all logged steps together."""
    tokens_per_second: float
    """Over all devices: the median of the logged steps."""
    peak_memory_gib: float
    """Most memory that the process which finished the run held on its host."""
    hardware: dict[str, str | int]
    """`platform`, `device`, `devices` and `processes`."""
    versions: dict[str, str]
    """Versions of the packages that wrote the last checkpoint."""

    @classmethod
    def of(cls, results: RunResults) -> "GrugRun":
        """Makes the artifact of a run that has just finished."""
        return cls.model_validate(asdict(results))

    def results(self) -> RunResults:
        """The run in numbers."""
        return RunResults(**self.model_dump(include={field.name for field in fields(RunResults)}))


class TextCorpus(Artifact):
    """Text, tokenized, in a folder of its own; `corpus_data` makes training data of it."""

    tokens: dict[str, int]
    """Training tokens of each domain."""


@dataclass(frozen=True)
class RunRequest:
    """What the step function of a run is given."""

    config: GrugNativeRunConfig
    """The run."""
    resources: ResourceConfig | str
    """What it asks a cluster for; without a cluster, the run takes the machine as it is. Where marin wants no more than
    the step's identity, a placeholder."""


@dataclass(frozen=True)
class _CorpusRequest:
    cache_dir: str
    vocab_size: int
    paths: Mapping[str, Paths] | None


def training_step(
    name: str,
    build: Callable[[StepContext], GrugNativeRunConfig],
    *,
    resources: ResourceConfig,
    deps: Sequence[ArtifactStep[Any]] = (),
    version: str = "dev",
) -> ArtifactStep[GrugRun]:
    """The run as a step; making it runs nothing.

    Args:
        name: of the artifact, with `/` to nest.
        build: makes the config. Paths come from its context: `output_path=ctx.output_path`, and the data from the
            `deps`, by `corpus_data` or marin's `mixture`.
        resources: what the run asks a cluster for; no part of the step's identity.
        deps: the tokenized datasets, and whatever else `build` reads.
        version: `dev`, `SOMETHING-dev`, or `YYYY.MM.DD` with an optional `.N`.

    Raises:
        ValueError: if the version is none of these.
    """
    # All versions of a step have their folders in one, so the folder's name alone would not tell runs apart.
    run_id = sanitize_job_name(f"{name.replace('/', '-')}-{version}")

    def build_config(ctx: StepContext) -> RunRequest:
        # marin's placeholder, "<output_path>", cannot be the name of a folder.
        config = build(replace(ctx, output_path="output_path") if ctx.is_fingerprint else ctx)
        return RunRequest(replace(config, trainer=replace(config.trainer, run_id=run_id)), ctx.runtime_arg("resources"))

    return ArtifactStep(
        name=user_namespaced_name(name, version),
        version=version,
        artifact_type=GrugRun,
        run=run_training,
        build_config=build_config,
        deps=tuple(deps),
        runtime_args={"resources": resources},
    )


def corpus_step(
    name: str, *, vocab_size: int, paths: Mapping[str, Paths] | None = None, version: str = "dev"
) -> ArtifactStep[TextCorpus]:
    """Tokenized text as a step.

    Args:
        name: of the artifact, with `/` to nest.
        vocab_size: tokens of the byte-level BPE that is trained on the text.
        paths: for each domain its files and folders; None takes what every Python carries.
        version: as in `training_step`.
    """

    def build_config(ctx: StepContext) -> _CorpusRequest:
        return _CorpusRequest(ctx.output_path, vocab_size, paths)

    return ArtifactStep(
        name=name, version=version, artifact_type=TextCorpus, run=_make_corpus, build_config=build_config
    )


def corpus_data(ctx: StepContext, corpus: ArtifactStep[TextCorpus]) -> LmDataConfig:
    """The training data of a `corpus_step` that is among the deps of the step being built."""
    folder = ctx.artifact_path(corpus)
    if ctx.is_fingerprint:
        return LmDataConfig(tokenizer=folder, cache_dir=folder)
    request: _CorpusRequest = corpus.build_config(StepContext.for_run(folder, ctx.prefix))
    return _corpus(request)


def run_steps(step: ArtifactStep[GrugRun], *, cluster: str | None = None) -> GrugRun:
    """Runs a step after its deps, or finds what it made before, and says which.

    Args:
        step: from `training_step`.
        cluster: address of an Iris controller, `http://HOST:PORT`. By default the cluster whose task this process is,
            or else this process itself.

    Raises:
        ValueError: if the step cannot be what it says, or a cluster is asked for without a folder that it shares.
        ConnectionError: if no controller answers at the address.
        SystemExit: after a signal that asked to stop; what was done is saved.
        Exception: whatever the step itself raised, as it was raised.
    """
    # The steps run in threads of this one's context, and so their loops are told of the signals which this one gets.
    with _prefix(cluster), _client(cluster), _tracebacks_only_raised(), StopSignal():
        _announce(step)
        try:
            StepRunner().run([lower(step)], max_concurrent=1)
        except RuntimeError as error:
            raise _cause(error) from None
        return step.artifact_type.raw_load(step.path())


def run_training(request: RunRequest) -> GrugRun:
    """The step function of a run: trains in this process, or through Fray where there is a cluster."""
    config = request.config
    place = config.output_path if is_bucket(config.output_path) else str(local_path(config.output_path))
    saved, steps = checkpoints_of(place).steps(), config.trainer.num_train_steps
    state = f"resumes at step {saved[0]} of {steps}" if saved else f"starts from scratch, for {steps} steps"
    logger.info("%s %s, in %s", config.run_id, state, place)
    if isinstance(current_client(), LocalClient):
        return GrugRun.of(train_to_results(config))
    assert isinstance(request.resources, ResourceConfig)
    _run_as_job(config, request.resources, place)
    return GrugRun.of(read_results(place))


def _run_as_job(config: GrugNativeRunConfig, resources: ResourceConfig, place: str) -> None:
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    write_file(place, "job.yaml", text.encode())
    job_config = f"{place}/job.yaml"
    environment = {name: os.environ[name] for name in RECORDED_ENVIRONMENT if name in os.environ}
    handle = current_client().submit(
        JobRequest(
            # The name is the run's: a driver that is started again finds its job, rather than start a second one.
            name=sanitize_job_name(config.run_id),
            entrypoint=Entrypoint.from_binary("python", ["-m", "grug_native.launch.job", f"--config={job_config}"]),
            resources=resources,
            environment=create_environment(extras=extras_for_resources(resources), env_vars=environment),
            max_retries_failure=_TASK_RETRIES,
            max_task_failures=_FAILED_TASKS,
        )
    )
    logger.info("job %s: %d task(s)", handle.job_id, resources.replicas)
    handle.wait(raise_on_failure=True)


def _make_corpus(request: _CorpusRequest) -> TextCorpus:
    data = _corpus(request)
    counts = read_counts(Path(data.cache_dir or "").parent)
    return TextCorpus(tokens={domain: splits["train"]["tokens"] for domain, splits in counts.items()})


def _corpus(request: _CorpusRequest) -> LmDataConfig:
    # A corpus is made on a disk. Where the executor's prefix is a bucket, each machine makes the same one.
    place = request.cache_dir
    folder = str(Path(DEFAULT_PREFIX, "corpora", place.partition("://")[2]).resolve()) if is_bucket(place) else place
    if request.paths is None:
        return embedded_corpus(folder, vocab_size=request.vocab_size)
    return local_text_data(request.paths, cache_dir=folder, vocab_size=request.vocab_size)


def _announce(step: ArtifactStep[Any]) -> None:
    name, path = f"{step.name}@{step.version}", step.path()
    if is_mutable_version(step.version):
        logger.info("%s goes on from what is in %s", name, path)
    elif StatusFile(path, worker_id="announce").status != STATUS_SUCCESS:
        logger.info("%s is made once, in %s, and served from then on", name, path)
    else:
        record = read_record(path)
        when = record.provenance.created_at if record and record.provenance else "an unknown time"
        logger.info("%s is served from %s, where it was made at %s: nothing runs", name, path, when)


def _cause(error: RuntimeError) -> BaseException:
    """The exception of a step, out of StepRunner's two wrappers; `error` itself if it is none of those."""
    wrapped = error.__cause__
    return error if wrapped is None else wrapped if wrapped.__cause__ is None else wrapped.__cause__


@contextmanager
def _tracebacks_only_raised() -> Generator[None]:
    """StepRunner logs the traceback of what `run_steps` raises; once is enough."""
    runner = logging.getLogger("marin.execution.step_runner")

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    runner.addFilter(below_error)
    try:
        yield
    finally:
        runner.removeFilter(below_error)


@contextmanager
def _prefix(cluster: str | None) -> Generator[None]:
    if os.environ.get(PREFIX_VARIABLE):
        yield
    elif cluster is not None:
        raise ValueError(
            f"{PREFIX_VARIABLE} is not set: a cluster needs a folder that all its machines see, "
            f"such as {PREFIX_VARIABLE}=/shared/marin"
        )
    else:
        with use_data_config(DataConfig(region_buckets={}, root=str(Path(DEFAULT_PREFIX).resolve()))):
            yield


@contextmanager
def _client(cluster: str | None) -> Generator[None]:
    if cluster is None:
        yield
        return
    from fray.iris_backend import FrayIrisClient

    _check_reachable(cluster)
    with set_current_client(FrayIrisClient(cluster, workspace=Path.cwd())):
        yield


def _check_reachable(cluster: str) -> None:
    """Knocks at the controller's port: Iris' own client would go on trying for many minutes."""
    address = urlsplit(cluster)
    if address.hostname is None or address.port is None:
        raise ValueError(f"cluster={cluster!r} is no address of an Iris controller: give http://HOST:PORT")
    try:
        socket.create_connection((address.hostname, address.port), timeout=_KNOCK_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"cluster={cluster!r}: nobody answers there ({error}). Start the Iris controller, check the address and "
            "the tunnel to it, or leave it out to train in this process"
        ) from error
