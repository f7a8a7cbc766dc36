class tqdm:
    n: int
    def __init__(
        self,
        *,
        desc: str | None = None,
        total: int | None = None,
        initial: int = 0,
        unit: str = "it",
        dynamic_ncols: bool = False,
    ) -> None: ...
    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None: ...
    def update(self, n: int = 1) -> bool | None: ...
    def close(self) -> None: ...
