import abc
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

T_contra = TypeVar("T_contra", contravariant=True)
U_co = TypeVar("U_co", covariant=True)

BatchResult = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]

class BatchProcessor(abc.ABC, Generic[T_contra, U_co]):
    @abc.abstractmethod
    def __call__(self, batch: Sequence[T_contra]) -> Sequence[U_co]: ...
    @property
    @abc.abstractmethod
    def output_exemplar(self) -> Any: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
