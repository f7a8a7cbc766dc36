"""levanter's data stack without what nobody here uses of it: imports that wait until what they bind is used.

Whoever reads a token cache with levanter also imports clients of two clouds and of a cluster, pandas, duckdb, kernels
for TPUs, and more: most of the time before a first step. The modules of `PUT_OFF` are executed as ever, but for the
imports in them that stand there: their names are bound to stand-ins. A stand-in imports the real thing as soon as it is
called, subclassed, or asked for an attribute, and then puts the real things in the place of all
stand-ins of its group. Nobody else's imports are touched, and `sys.modules` never holds a stand-in: who imports pandas,
gets pandas.

Which imports can wait was found by reading those modules, in the versions of `VERSIONS`. In another version none waits.
"""

import builtins
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Union, final, override

VERSIONS = {
    "deepdiff": ("deepdiff", "9.1.0"),
    "haliax": ("marin-haliax", "0.2.227.dev40316220070"),
    "levanter": ("marin-levanter", "0.2.227.dev40316220070"),
    "rigging": ("marin-rigging", "0.2.227.dev40316220070"),
}
"""Of the packages whose modules are in `PUT_OFF`: the distribution, and the version that was read."""

PUT_OFF: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "deepdiff.deephash": {"kinds of tables, to be told apart": ("pandas", "polars")},
    "deepdiff.helper": {"a kind of record, to be told apart": ("pydantic.main",)},
    "haliax.nn.ragged_dot": {
        "kernels for a mixture of experts": (
            "jax.experimental",
            "jax.experimental.pallas",
            "jax.experimental.pallas.ops.tpu.megablox",
        )
    },
    "haliax.quantization": {"products of integers": ("aqt.jax.v2.config", "aqt.jax.v2.aqt_dot_general")},
    "levanter.data.loader": {"attention by name; ours is our own": ("levanter.layers.attention",)},
    "levanter.data.packing": {"attention by name; ours is our own": ("levanter.layers.attention",)},
    "levanter.data.sharded_datasource": {
        "texts on the Hugging Face hub": ("datasets",),
        "texts in Parquet files": ("pyarrow.parquet",),
    },
    "levanter.data.text.examples": {"attention by name; ours is our own": ("levanter.layers.attention",)},
    "levanter.eval": {
        "callbacks of levanter's trainer, and its trackers": ("levanter.callbacks", "levanter.tracker"),
        "a progress bar": ("tqdm_loggable.auto",),
    },
    "levanter.grug.attention": {
        "kernels for GPUs": ("levanter.grug.attention._fa4_cute",),
        "attention in blocks": ("levanter.grug.attention._xla_flash",),
    },
    "levanter.grug.attention._core": {
        "kernels for TPUs": ("jax.experimental.pallas.ops.tpu.splash_attention",),
    },
    "levanter.kernels.pallas.splash_attention": {
        "kernels for TPUs": ("jax.experimental.pallas.ops.tpu.splash_attention",),
    },
    "levanter.models.lm_model": {
        "attention by name; ours is our own": ("levanter.layers.attention",),
        "the fused cross-entropy, with a store of what it has tuned": ("levanter.models.loss",),
    },
    "levanter.store.cache": {
        "caches made on a cluster": ("fray.types", "zephyr.context", "zephyr.dataset", "zephyr.writers"),
    },
    "levanter.tensorstore_serialization": {"levanter's checkpoints": ("levanter.checkpoint_manifest",)},
    "levanter.tokenizers": {
        "tokenizers that are not in a folder": (
            "huggingface_hub",
            "huggingface_hub.utils",
            "rigging.filesystem.buckets",
        )
    },
    "levanter.tracker.helpers": {"the state of a repository": ("git",)},
    "levanter.tracker.wandb": {"wandb": ("wandb",), "the state of a repository": ("git",)},
    "rigging.filesystem.cluster_config": {"Google's buckets": ("google.api_core.exceptions", "google.cloud")},
    "rigging.filesystem.factory": {"Amazon's buckets": ("rigging.filesystem.s3_compat",)},
    "rigging.filesystem.s3_errors": {"Amazon's buckets": ("aiohttp", "botocore.exceptions")},
}
"""Of each module the imports that wait, in groups, by what they are for."""

ELSEWHERE: Mapping[tuple[str, ...], str] = {
    ("levanter.layers.attention", "AttentionMask"): "levanter.layers.attention_mask",
}
"""Where what such an import names, and what is needed at once, is defined."""

put_off: set[tuple[str, str]] = set()
"""The imports that have been put off in this process: the importing module, and what it imports."""


def install() -> None:
    """Has the imports of `PUT_OFF` wait, in modules that are not imported yet."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


@final
class _Group:
    """Imports of a module that wait together."""

    def __init__(self, names: dict[str, Any]):
        self.names = names
        """The module's global names."""
        self.executing = True
        """Whether the module is still executed: then `from a import b`, and annotations such as `a.B`, use nothing."""


@final
class StandIn:
    """What an import that waits has bound."""

    __slots__ = ("__group", "__load", "__module", "__names")

    def __init__(self, group: _Group, module: str, load: Callable[[], Any], names: Sequence[str] = ()):
        self.__group, self.__module, self.__load, self.__names = group, module, cache(load), names

    def __real(self) -> Any:
        real, group = self.__load(), self.__group
        if not group.executing:
            for name, value in list(group.names.items()):
                if type(value) is StandIn and value.__group is group:
                    group.names[name] = value.__load()
        return real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - as the other special methods
        return self.__real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if not self.__group.executing:
            return getattr(self.__real(), name)
        if name.startswith("__") and name not in self.__names:  # `typing` looks for some in whatever it is given.
            raise AttributeError(name)
        return StandIn(self.__group, self.__module, lambda: getattr(self.__load(), name))

    @override
    def __str__(self) -> str:
        return str(self.__real())

    @override
    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _itself, (self.__real(),)  # A function that is sent to another process takes the real thing along.

    def __instancecheck__(self, instance: object) -> bool:
        # Of a class that nobody has imported yet there is no instance.
        return self.__module in sys.modules and isinstance(instance, self.__real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.__real())

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return (self.__real(),)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - `|` between what is no type yet

    __ror__ = __or__


def _itself(real: Any) -> Any:
    return real


@final
class _Loader(SourceFileLoader):
    """Executes a module of `PUT_OFF`."""

    @override
    def exec_module(self, module: ModuleType) -> None:
        importer, names = module.__name__, vars(module)
        groups = {target: group for each in PUT_OFF[importer].values() for group in [_Group(names)] for target in each}

        def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
            def load() -> Any:
                return builtins.__import__(name, globals, locals, fromlist, level)

            group = groups.get(name) if level == 0 else None
            if group is None or not group.executing or find_spec(name.partition(".")[0]) is None:
                return load()
            put_off.add((importer, name))
            lighter = ELSEWHERE.get((name, *(fromlist or ())))
            return StandIn(group, name, load, fromlist or ()) if lighter is None else import_module(lighter)

        # The interpreter looks for `__import__` here, as for all built-in names.
        names["__builtins__"] = vars(builtins) | {"__import__": import_}
        try:
            super().exec_module(module)
        finally:
            for group in groups.values():
                group.executing = False


@final
class _Finder:
    """Finds the modules of `PUT_OFF`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Finds such a module where it is, and gives it a loader that has imports wait."""
        if name not in PUT_OFF or not _is_known(name.partition(".")[0]):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


@cache
def _is_known(package: str) -> bool:
    distribution, known = VERSIONS[package]
    return version(distribution) == known
