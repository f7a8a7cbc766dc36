from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

def blocking_wait(coro: Awaitable[T]) -> T: ...
