from typing import Any, TypedDict

class GenKwargs(TypedDict, total=False):
    do_sample: bool
    temperature: float
    max_gen_toks: int
    until: list[str]

def handle_stop_sequences(until: str | list[str] | None, eos: str | None) -> list[str]: ...
def normalize_gen_kwargs(gen_kwargs: dict[str, Any], default_max_gen_toks: int = 256) -> GenKwargs: ...
def postprocess_generated_text(generation: str, stop: list[str] | str | None, think_end_token: str | None) -> str: ...
