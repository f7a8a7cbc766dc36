from contextlib import AbstractContextManager
from typing import overload

from levanter.tracker.tracker import Tracker

@overload
def current_tracker() -> Tracker: ...
@overload
def current_tracker(tracker: Tracker) -> AbstractContextManager[None]: ...
