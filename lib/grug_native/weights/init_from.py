"""The first parameters of a run, from elsewhere: opened and compared with the run before any of them is loaded."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from grug_native.bucket.place import read_config_file
from grug_native.checkpoint.metadata import config_differences
from grug_native.data.vocabulary import check_same_vocabulary
from grug_native.host.shell import offer
from grug_native.language_model import LanguageModel, ModelConfig
from grug_native.model import GrugModelConfig
from grug_native.weights.config import InitFrom
from grug_native.weights.sources import hf_model, hf_tokenizer, is_run, open_source

_FREE = ("model.initializer_std", "model.max_seq_len")
"""Numbers of a model that parameters which are there no longer depend on."""

logger = logging.getLogger(__name__)


@final
class InitialParameters:
    """Parameters that fit into a run; none of them is read yet."""

    def __init__(
        self,
        init_from: InitFrom,
        model: ModelConfig,
        params: LanguageModel,
        *,
        tokenizer: str,
        free: Sequence[str],
        allowed: Sequence[str],
    ):
        """Opens the source, and compares it.

        Args:
            init_from: what to open.
            model: config of the run's model.
            params: its parameters, abstract, with their shardings.
            tokenizer: of the run's data.
            free: fields, and sections, of the config in which the source may differ.
            allowed: likewise, of which it is said that they do.

        Raises:
            ValueError: it cannot be read, or does not fit: names each leaf, field or token.
            DamagedCheckpointError: it is a damaged checkpoint.
        """
        self._source, self._params = open_source(init_from, model), params
        there, here = ({"model": section} for section in self._source.models(model))
        differences = config_differences(there, here)
        found = [d for d in differences if not _covered(d.name, (*_FREE, *free))]
        refused = [d.name for d in found if not _covered(d.name, allowed)]
        leaves = self._source.differences(params)
        fields = [f"{d.name}: {d.stored} there, {d.wanted} here" for d in found]
        if refused or leaves:
            way_out = "give the run the model that is there" + (
                "" if leaves else f", or, if it is meant, {offer('trainer.allow_changes', f'[{", ".join(refused)}]')}"
            )
            raise ValueError(
                "\n  ".join([f"{self._source} does not fit, and nothing of it is loaded; {way_out}:", *fields, *leaves])
            )
        for line in fields:
            logger.warning("the model is another than that of %s: %s", self._source, line)
        tokens = check_same_vocabulary(lambda: self._source.tokenizer, tokenizer, digest=self._source.tokenizer_digest)
        beyond = model.vocab_size - tokens
        words = f"; {beyond} rows of its vocabulary are beyond the {tokens:,} tokens of the tokenizer, and are kept"
        self.described = (
            f"the parameters of {self._source}, with a fresh optimizer, from step 0{words if beyond > 0 else ''}"
        )
        """What the run starts with, in words."""

    def load(self) -> tuple[LanguageModel, InitFrom]:
        """Loads the parameters, under their mesh; several processes do so together.

        Returns:
            The parameters, and what they are: the same of any later load.

        Raises:
            ValueError: one is not finite, or they are others than `digest` says.
            DamagedCheckpointError: they are not what was saved.
        """
        params, digest = self._source.load(self._params)
        wanted = self._source.init_from.digest
        if wanted not in (None, digest):
            raise ValueError(
                f"trainer.init_from: the parameters of {self._source} have digest {digest}, and {wanted} is asked for: "
                "they have changed since. Put them back, or set trainer.init_from.digest to null"
            )
        logger.info("loaded the parameters of %s, digest %s", self._source, digest)
        return params, replace(self._source.init_from, digest=digest)


def promised_model(init_from: InitFrom) -> tuple[Mapping[str, Any], str]:
    """The `model` section and the tokenizer of a run that is to start from there.

    Raises:
        ValueError: they cannot be told.
    """
    if is_run(init_from):
        raw = read_config_file(init_from.source)
        return raw["model"], raw["data"]["tokenizer"]
    folder = Path(init_from.source)
    return hf_model(folder, GrugModelConfig.from_hf), hf_tokenizer(folder)


def _covered(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)
