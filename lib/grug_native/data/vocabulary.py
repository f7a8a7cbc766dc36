"""By which tokenizer a token cache was made: levanter records its name, which another one may have by now."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rigging.filesystem.storage_path import StoragePath

from grug_native.host.shell import offer

if TYPE_CHECKING:
    from levanter.data.text.datasets import LmDataConfig
    from levanter.tokenizers import MarinTokenizer

VOCABULARY_RECORD = "vocabulary.sha256"
"""File in a token cache: the `vocabulary_digest` of the tokenizer that made it."""


def vocabulary_digest(tokenizer: "MarinTokenizer") -> str:
    """SHA-256 of which token each id means: the same wherever the tokenizer lies, and whoever has saved it."""
    meaning = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def record_vocabulary(cache: str, tokenizer: "MarinTokenizer") -> None:
    """Writes into a token cache by which tokenizer it has just been made."""
    StoragePath(f"{cache}/{VOCABULARY_RECORD}").write_text(vocabulary_digest(tokenizer))


def check_vocabulary(cfg: "LmDataConfig", cache: str, recorded_name: str | None, corpus: Path | None) -> bool:
    """Refuses a token cache whose ids mean other tokens than those of the config's tokenizer.

    Args:
        cfg: with the tokenizer.
        cache: its folder, or URL.
        recorded_name: of the tokenizer that made it, by levanter's ledger; None if that names none.
        corpus: folder of the corpus to which it belongs, if it does.

    Returns:
        Whether it could be told: a cache without a record, whose tokenizer has another name and is gone, may be any.

    Raises:
        ValueError: if another tokenizer made it.
    """
    record = StoragePath(f"{cache}/{VOCABULARY_RECORD}")
    if cfg.tokenizer == "passthrough":
        return True
    if record.exists():
        made, name = record.read_text().strip(), recorded_name
    elif recorded_name in (None, cfg.tokenizer):
        return True
    else:
        # Of a corpus that was moved, it lies there, and no longer where it was.
        places = [Path(recorded_name), *([] if corpus is None else [corpus / "tokenizer"])]
        place = next((place for place in places if (place / "tokenizer.json").is_file()), None)
        if place is None:
            return False
        made, name = _digest_of(str(place)), str(place)
    if made == _digest_of(cfg.tokenizer):
        return True
    way_out = "give the one that made it" if name in (None, cfg.tokenizer) else offer("data.tokenizer", name)
    raise ValueError(
        f"the token cache {cache} was made by another tokenizer than data.tokenizer={cfg.tokenizer!r}, by which its "
        f"ids mean other tokens: {way_out}, or have a cache made by this one, in another data.cache_dir"
    )


@lru_cache(maxsize=8)
def _digest_of(name: str) -> str:
    from levanter.tokenizers import load_tokenizer  # It keeps them, too.

    return vocabulary_digest(load_tokenizer(name))
