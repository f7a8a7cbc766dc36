class FewshotConfig:
    split: str | None
