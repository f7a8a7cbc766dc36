"""The parts of a run that are heavy, each made on first use and then shared: mesh, data, state, fingerprints."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding

from grug_native.config import COSMETIC_FIELDS, GrugNativeRunConfig
from grug_native.data.text_tokens import text_only
from grug_native.fitting import compile_fitting, microbatch_sizes
from grug_native.kernels.backend import current_backend
from grug_native.kernels.choices import Choice
from grug_native.loss import ComputeDtype
from grug_native.metrics import Throughput, flops_per_token, peak_device_flops
from grug_native.microbatches import check_microbatch_size
from grug_native.optimizer import GrugOptimizer
from grug_native.sharding import batch_sharding, batch_shards, create_mesh
from grug_native.state import GrugTrainState, init_train_state, start_train_state
from grug_native.train import CompiledStep, GrugStepConfig, PlainBatch

if TYPE_CHECKING:
    from levanter.data.loader import DataLoader
    from levanter.data.mixture import MixtureDataset
    from levanter.data.text.datasets import LmDataConfig
    from levanter.data.text.examples import GrugLmExample
    from levanter.schedule import BatchSchedule
    from levanter.tokenizers import MarinTokenizer

    from grug_native.data.record import DataRecord
    from grug_native.evaluation.harness import GrugHarness
    from grug_native.evaluation.perplexity import TaggedEval
    from grug_native.weights.config import InitFrom
    from grug_native.weights.init_from import InitialParameters


@final
class RunParts:
    """The one mutable thing behind a `GrugRunner`: a cache of what its config determines."""

    def __init__(self, config: GrugNativeRunConfig, optimizer: GrugOptimizer):
        """Takes what determines the parts; builds none of them."""
        self.config = config
        self.optimizer = optimizer
        self.fitted: dict[int, Choice] = {}
        """With `microbatch_size=auto`, what was chosen for each size of batch that has been compiled."""
        self.origin: InitFrom | None = None
        """What the parameters of the last initial state were loaded from; None if they were drawn."""
        self._steps: dict[int, CompiledStep] = {}
        self._compiling = threading.Lock()

    @cached_property
    def mesh(self) -> Mesh:
        """The device mesh.

        Raises:
            ValueError: if batch sizes, or that of a microbatch, do not divide over it.
        """
        trainer = self.config.trainer
        mesh = create_mesh([size for _, size in trainer.batch_stages], trainer.mesh)
        if isinstance(trainer.microbatch_size, int):
            check_microbatch_size(trainer.microbatch_size, trainer.batch_size_at(0), batch_shards(mesh))
        return mesh

    @cached_property
    def step_config(self) -> GrugStepConfig:
        """The numbers of a step, with the compute dtype resolved for the backend."""
        trainer = self.config.trainer
        dtype: ComputeDtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return GrugStepConfig(
            z_loss_weight=trainer.z_loss_weight,
            ema_beta=trainer.ema_beta,
            compute_dtype=dtype if trainer.compute_dtype == "auto" else trainer.compute_dtype,
            cross_entropy=trainer.cross_entropy,
            watch_every=trainer.watch_every,
            microbatch_size=None if trainer.microbatch_size == "auto" else trainer.microbatch_size,
            skip_nonfinite=trainer.nonfinite == "skip",
        )

    def init_state(self) -> GrugTrainState:
        """Makes the state of step 0 on the mesh, of fresh parameters or of those of `trainer.init_from`."""
        trainer, initial = self.config.trainer, self.initial_parameters
        with jax.set_mesh(self.mesh):
            if initial is None:
                return self._draw_state()
            params, self.origin = initial.load()
            key = jax.random.key(trainer.seed)
            return start_train_state(params, self.optimizer, key=key, ema=trainer.ema_beta is not None)

    @cached_property
    def initial_parameters(self) -> "InitialParameters | None":
        """What `trainer.init_from` names, found to fit; None if it names nothing.

        Raises:
            ValueError: if it does not fit, or cannot be read.
            DamagedCheckpointError: if it is a damaged checkpoint.
        """
        config, trainer = self.config, self.config.trainer
        if trainer.init_from is None:
            return None
        from grug_native.weights.init_from import InitialParameters

        return InitialParameters(
            trainer.init_from,
            config.model,
            self.state_shape.params,
            tokenizer=config.data.tokenizer,
            free=COSMETIC_FIELDS,
            allowed=trainer.allow_changes,
        )

    def _draw_state(self) -> GrugTrainState:
        trainer = self.config.trainer
        key = jax.random.key(trainer.seed)
        return init_train_state(self.config.model, self.optimizer, key=key, ema=trainer.ema_beta is not None)

    @cached_property
    def state_shape(self) -> GrugTrainState:
        """The state as abstract arrays with their shardings.

        Raises:
            ValueError: if the model does not divide over the mesh, or the optimizer refuses the parameters.
        """

        def on_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else jax.P()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))

        with jax.set_mesh(self.mesh):
            shape = eqx.filter_eval_shape(self._draw_state)
        self.optimizer.routing(shape.params)
        return jax.tree.map(on_mesh, shape)

    @property
    def largest_batch(self) -> int:
        """Sequences of the largest batch of the run."""
        return max(size for _, size in self.config.trainer.batch_stages)

    def batch_shape(self, sequences: int | None = None) -> PlainBatch:
        """A batch as abstract arrays on the mesh, by default the largest of the run."""
        config = self.config
        return PlainBatch.abstract(
            self.largest_batch if sequences is None else sequences,
            config.seq_len,
            packed=config.data.block_cross_document_attention,
            sharding=batch_sharding(self.mesh),
        )

    def compiled_step(self, sequences: int | None = None) -> CompiledStep:
        """The train step for batches of so many sequences, by default the largest: compiled once for each size.

        Raises:
            ValueError: if the microbatches are to fit, and no size does.
        """
        size = self.largest_batch if sequences is None else sequences
        with self._compiling:
            if size not in self._steps:
                with jax.set_mesh(self.mesh):
                    self._steps[size] = self._compile(size)
            return self._steps[size]

    def _compile(self, sequences: int) -> CompiledStep:
        batch, config = self.batch_shape(sequences), self.step_config
        if self.config.trainer.microbatch_size != "auto":
            return CompiledStep(self.optimizer, self.state_shape, batch, config)

        def compile(size: int) -> CompiledStep:
            return CompiledStep(self.optimizer, self.state_shape, batch, replace(config, microbatch_size=size))

        sizes = microbatch_sizes(sequences, batch_shards(self.mesh))
        step, self.fitted[sequences] = compile_fitting(compile, sizes, current_backend())
        return step

    def compile_ahead(self, sequences: int) -> Future[CompiledStep]:
        """Begins to compile the train step beside what comes next, which reads files and waits."""
        _ = self.state_shape  # A property that two threads would make twice.
        pool = ThreadPoolExecutor(1, "compile")
        future = pool.submit(self.compiled_step, sequences)
        pool.shutdown(wait=False)
        return future

    @cached_property
    def batch_schedule(self) -> "BatchSchedule":
        """Sequences per step, as levanter wants them."""
        from levanter.schedule import BatchSchedule, ScheduleStep

        stages = self.config.trainer.batch_stages
        return BatchSchedule([ScheduleStep(start, size) for start, size in stages])

    @cached_property
    def tokenizer(self) -> "MarinTokenizer":
        """The tokenizer of the data; of the spelling of a special token it makes text.

        Raises:
            ValueError: if it is not to be had, or has more tokens than the model.
        """
        tokenizer, vocab_size = text_only(load_tokenizer(self.config.data)), self.config.model.vocab_size
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"model.vocab_size={vocab_size} is smaller than the {len(tokenizer)} tokens of the tokenizer "
                f"{self.config.data.tokenizer!r}: raise it to at least {len(tokenizer)}"
            )
        return tokenizer

    @cached_property
    def dataset(self) -> "MixtureDataset[GrugLmExample]":
        """The training mixture.

        Raises:
            ValueError: if the tokenizer has more tokens than the model, or the data cannot be what the config says.
        """
        from haliax import Axis

        from grug_native.data.loader import build_train_dataset

        config = self.config
        _ = self.tokenizer  # Its tokens have to fit in the model.
        seed = config.trainer.seed if config.trainer.data_seed is None else config.trainer.data_seed
        return build_train_dataset(
            config.data,
            Axis("position", config.seq_len),
            jax.random.PRNGKey(seed),
            batch_schedule=self.batch_schedule,
            vocab_size=config.model.vocab_size,
        )

    @cached_property
    def loader(self) -> "DataLoader[GrugLmExample]":
        """Which sequences make which batch, and how they lie on the mesh."""
        from grug_native.data.loader import build_train_loader

        schedule = self.batch_schedule.schedule
        return build_train_loader(self.dataset, self.mesh, schedule, prefetch=self.config.trainer.prefetch)

    @cached_property
    def data_fingerprint(self) -> str:
        """Digest of the training tokens and of everything that decides their order."""
        from grug_native.checkpoint.metadata import canonical_hash

        return canonical_hash(self.data_record.digests)

    @cached_property
    def data_record(self) -> "DataRecord":
        """What the fingerprint of the data is made of, and the files of their corpus."""
        from grug_native.data.cache import data_fingerprint
        from grug_native.data.record import DataRecord, read_sources

        _ = self.dataset  # It verifies the caches: a damaged one is to be named, and not to pass for other data.
        data = self.config.data
        return DataRecord(data_fingerprint(data), read_sources(Path(data.cache_dir).parent) if data.cache_dir else {})

    @cached_property
    def evaluation(self) -> Callable[[GrugTrainState], dict[str, float]] | None:
        """Evaluates a state on the validation sets; None where the data have none.

        Raises:
            ValueError: if the evaluation cannot be what the config says.
        """
        from grug_native.evaluation.perplexity import build_tagged_eval_callback

        return None if self.tagged is None else build_tagged_eval_callback(self.tagged, self.config.eval)

    @cached_property
    def tagged(self) -> "TaggedEval | None":
        """The tagged evaluation over the validation sets; None where the data have none."""
        from grug_native.evaluation.perplexity import build_eval_sets, build_tagged_evaluator

        config = self.config
        sets = build_eval_sets(config.data, config.seq_len, config.model.vocab_size)
        if not sets:
            return None
        return build_tagged_evaluator(
            sets,
            batch_size=self.eval_batch_size,
            mesh=self.mesh,
            vocab_size=config.model.vocab_size,
            tokenizer=self.tokenizer if config.eval.compute_bpb else None,
            max_batches=config.eval.max_eval_batches,
            compute_dtype=self.step_config.compute_dtype,
        )

    @cached_property
    def harness(self) -> "GrugHarness | None":
        """The tasks of lm-eval which the config names; None where it names none.

        Raises:
            ValueError: as `build_harness`.
        """
        if self.config.eval.harness is None:
            return None
        from grug_native.evaluation.harness import build_harness

        return build_harness(self.config.eval.harness, self.tokenizer, max_length=self.config.seq_len)

    @property
    def eval_batch_size(self) -> int:
        """Sequences of an evaluation batch over all devices."""
        size = self.config.eval.eval_batch_size
        return self.config.trainer.batch_size_at(0) if size is None else size

    @cached_property
    def throughput(self) -> Throughput:
        """How a step's time becomes metrics."""
        peak = peak_device_flops(jax.devices()[0])
        flops = flops_per_token(self.config.model, self.config.seq_len)
        return Throughput(flops, self.config.seq_len, None if peak is None else peak * jax.device_count())


def load_tokenizer(data: "LmDataConfig") -> "MarinTokenizer":
    """Loads the tokenizer of a data config.

    Raises:
        ValueError: if it is not to be had; says what to do.
    """
    name = data.tokenizer
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if is_path and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"data.tokenizer={name!r} is no folder here. A run that was moved needs its corpus too: put it back there, "
            "or give the place of its tokenizer, with the tokenizer.json, in data.tokenizer"
        )
    try:
        return data.the_tokenizer
    except OSError as error:
        raise ValueError(
            f"data.tokenizer={name!r} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Connect to the network (and log in, if the "
            "tokenizer asks for it), give the folder of a tokenizer.json, or train on a local corpus, which brings its "
            "own: with the speedrun, --data local or --data FOLDER"
        ) from error
    except Exception as error:  # tokenizers raises bare Exception for every kind of bad file
        raise ValueError(f"data.tokenizer={name!r} holds no tokenizer that can be read: {error}") from error


def check_tokenizer(name: str) -> None:
    """Loads a tokenizer that data are to be made with.

    Raises:
        ValueError: if it is not to be had; says what to do.
    """
    from levanter.data.text.datasets import LmDataConfig

    load_tokenizer(LmDataConfig(tokenizer=name))
