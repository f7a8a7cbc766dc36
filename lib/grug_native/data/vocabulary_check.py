"""Are the token ids of a dataset ids of the model's vocabulary?"""

import dataclasses
from collections.abc import Sequence
from typing import override

import numpy as np
from levanter.data.dataset import AsyncDataset
from levanter.data.text.examples import GrugLmExample


@dataclasses.dataclass(frozen=True, eq=False)
class VocabCheckedDataset(AsyncDataset[GrugLmExample]):
    """A dataset whose token ids are looked at on the host: on a device, JAX would clamp a bad one in silence."""

    dataset: AsyncDataset[GrugLmExample]
    """What is checked; its indices are the rows that an error names."""
    name: str
    """The component's name in the data config."""
    vocab_size: int
    """Ids must lie in `[0, vocab_size)`."""
    spaces_before_eos: bool = False
    """Whether each document ends in a space that its text does not have; see `cache.spaces_before_eos`."""

    @override
    async def async_len(self) -> int:
        """Number of sequences."""
        return await self.dataset.async_len()

    @override
    def is_finite(self) -> bool:
        """Whether the number of sequences is known."""
        return self.dataset.is_finite()

    @override
    async def get_batch(self, indices: Sequence[int]) -> Sequence[GrugLmExample]:
        """Returns the sequences at `indices`.

        Raises:
            ValueError: if a token id lies outside the vocabulary; names the first one.
        """
        examples = await self.dataset.get_batch(indices)
        if not examples:
            return examples
        self.check(indices, np.stack([np.asarray(example.tokens) for example in examples]))
        return examples

    def check(self, rows: Sequence[int] | np.ndarray, tokens: np.ndarray) -> None:
        """Looks at the tokens, of shape (N, S), of the sequences at some rows.

        Raises:
            ValueError: if a token id lies outside the vocabulary; names the first one.
        """
        bad = (tokens < 0) | (tokens >= self.vocab_size)
        if bad.any():
            which, position = np.argwhere(bad)[0]
            raise ValueError(
                f"dataset {self.name!r}, row {rows[which]}, position {position}: token id {tokens[which, position]} "
                f"is outside the vocabulary [0, {self.vocab_size}). The cache is damaged, or was built with another "
                "tokenizer than the one that model.vocab_size was chosen for"
            )
