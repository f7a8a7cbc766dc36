from collections.abc import Sequence

class _Value:
    tag: str
    simple_value: float

class _Summary:
    value: Sequence[_Value]

class SessionLog:
    START: int
    status: int

class Event:
    step: int
    session_log: SessionLog
    summary: _Summary
    def ParseFromString(self, serialized: bytes) -> int: ...
