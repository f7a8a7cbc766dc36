"""What there is to know of an `LmDataConfig` without levanter's data stack, for who does not open the data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from grug_native.data.mixture import Weights, check_names

if TYPE_CHECKING:
    from levanter.tokenizers import MarinTokenizer


@dataclass(frozen=True, kw_only=True)
class DataSketch:
    """What a plan, a sampler and an export read of an `LmDataConfig`, under the same names."""

    tokenizer: str = "gpt2"
    """Folder or name of the tokenizer."""
    cache_dir: str | None = None
    """Where the token caches are; of a corpus of ours, in its folder."""
    train_weights: Weights | None = None
    """Weights of the components, or stages of them."""
    components: Mapping[str, object] = field(default_factory=dict[str, object])
    """The components by name."""
    mixture_block_size: int = 2048
    """Sequences within which the shares are exact."""
    block_cross_document_attention: bool = True
    """Whether batches carry segment ids."""
    vocab_size: int | None = None
    """Of the tokenizer `passthrough`, which takes numbers for tokens."""

    @staticmethod
    def of(raw: Mapping[str, Any]) -> "DataSketch":
        """Takes what it needs of the `data` section of a config file."""
        found = {field.name: raw[field.name] for field in fields(DataSketch) if field.name in raw}
        weights = found.get("train_weights")
        if isinstance(weights, list):
            found["train_weights"] = [(step, {n: float(w) for n, w in shares.items()}) for step, shares in weights]
        elif isinstance(weights, dict):
            found["train_weights"] = {name: float(weight) for name, weight in weights.items()}
        sketch = DataSketch(**found)
        check_names(sketch.train_weights, sketch.components)
        return sketch

    @property
    def the_tokenizer(self) -> "MarinTokenizer":
        """The tokenizer, as that of an `LmDataConfig`."""
        if self.tokenizer == "passthrough":
            from levanter.data.passthrough_tokenizer import PassthroughTokenizer

            assert self.vocab_size is not None
            return PassthroughTokenizer(self.vocab_size)
        from levanter.tokenizers import load_tokenizer

        return load_tokenizer(self.tokenizer)
