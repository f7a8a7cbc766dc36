from jaxlib._jax import pytree as pytree

class Device:
    id: int
    process_index: int
    platform: str
    device_kind: str
    local_hardware_id: int | None
    def memory_stats(self) -> dict[str, int] | None: ...
