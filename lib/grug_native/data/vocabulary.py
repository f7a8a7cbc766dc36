"""Which token each id means: by which tokenizer a token cache was made, and whether two tokenizers mean the same.

levanter records the name of the one that made a cache, which another one may have by now.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
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


def tokenizer_digest(cfg: "LmDataConfig") -> str:
    """Returns the sha256 of `tokenizer.json`; of the vocabulary, when the tokenizer is not a local folder."""
    file = StoragePath(f"{cfg.tokenizer}/tokenizer.json")
    if file.exists():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return vocabulary_digest(cfg.the_tokenizer)


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


TOKENIZER_FILE = "tokenizer.json"
"""Of a tokenizer in a folder, the file that says everything of how texts become ids."""

_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def write_tokenizer(tokenizer: "MarinTokenizer", folder: Path) -> None:
    """Writes a tokenizer as `transformers` reads it: the files of its own folder; of one from a hub, the same made."""
    from levanter.tokenizers import HfMarinTokenizer

    own = Path(tokenizer.name_or_path)
    if (own / TOKENIZER_FILE).is_file():
        for name in _FILES:
            if (own / name).is_file():
                shutil.copyfile(own / name, folder / name)
        return
    assert isinstance(tokenizer, HfMarinTokenizer)
    tokenizer._tokenizer.save(str(folder / TOKENIZER_FILE))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
    }
    known = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(known, indent=1))


def check_same_vocabulary(theirs: Callable[[], str], ours: str, *, digest: str | None = None) -> int:
    """Checks that two tokenizers, each a folder or a name on a hub, mean the same tokens by the same ids.

    Args:
        theirs: gives the one with which weights were trained, if it has to be looked at.
        ours: of the data.
        digest: SHA-256 of their `tokenizer.json`, if it is known; of an equal one nothing else is asked.

    Returns:
        How many ids there are, up to the largest.

    Raises:
        ValueError: if they do not, or theirs cannot be had; says in what they differ.
    """
    file = Path(ours) / TOKENIZER_FILE
    known = _vocabulary(ours)
    if digest is None or not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        other = _vocabulary(name := theirs())
        differing = sorted(token for token in other.keys() | known.keys() if other.get(token) != known.get(token))
        if differing:
            shown = ", ".join(f"{t!r} is {other.get(t)} there and {known.get(t)} here" for t in differing[:3])
            raise ValueError(
                f"the tokenizer {name!r}, with which the weights were trained, has another vocabulary than "
                f"data.tokenizer={ours!r}: of {len(differing):,} tokens the ids differ ({shown}). Make the data with "
                "theirs"
            )
    return 1 + max(known.values())


def _vocabulary(name: str) -> dict[str, int]:
    file = Path(name) / TOKENIZER_FILE
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(file)).get_vocab()
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise ValueError(f"{file} is no tokenizer: {error}") from error
    from levanter.tokenizers import load_tokenizer

    try:
        return load_tokenizer(name).get_vocab()
    except OSError as error:
        raise ValueError(
            f"the tokenizer {name!r} is not to be had ({type(error).__name__}), so the vocabulary of the weights "
            "cannot be compared with that of the data: put it back there"
        ) from error
