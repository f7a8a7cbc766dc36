class _Run:
    run_id: str

class _Step:
    num: int

class _History:
    step: _Step

class Record:
    run: _Run
    history: _History
    def ParseFromString(self, serialized: bytes) -> int: ...
    def HasField(self, field_name: str) -> bool: ...
