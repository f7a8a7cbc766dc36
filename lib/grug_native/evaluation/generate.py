"""Text from a model: a prompt is read once, then tokens are drawn one by one against the model's cache.

The work is done on one device, on a copy of the parameters; so it needs room for all of them there.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from grug_native.attention import Mask
from grug_native.data.text_tokens import text_only
from grug_native.language_model import LanguageModel, ModelConfig, cast_parameters
from grug_native.loss import ComputeDtype
from grug_native.sharding import AXIS_NAMES
from grug_native.types import Scalar, check_seed

if TYPE_CHECKING:
    from levanter.tokenizers import MarinTokenizer

_NEW_TOKENS = 128
"""Drawn if nobody says how many."""
_PADDING = -1
"""Segment of what stands before a prompt, so that few lengths are compiled."""
_ROUNDED_TO = 64
"""Lengths are rounded up to a multiple of this many positions, so that few of them are compiled."""


def check_room(config: ModelConfig, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuses a prompt and new tokens that do not fit in the model together.

    Raises:
        ValueError: says how many would.
    """
    room = config.max_seq_len - prompt_tokens
    if not 1 <= max_new_tokens <= room:
        way_out = f"ask for 1 to {room} new tokens, or shorten the prompt" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} do not fit in "
            f"model.max_seq_len={config.max_seq_len}: {way_out}"
        )


def generate(
    params: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    compute_dtype: ComputeDtype = "float32",
) -> list[int]:
    """Draws the tokens that follow a prompt.

    Args:
        params: the model, laid out over any mesh; with several processes, each must call this. For many texts, give
            what `on_one_device` makes of it.
        prompt: token ids, at least one.
        max_new_tokens: at most so many are drawn.
        temperature: divides the logits, a number of at least 0; 0 takes the likeliest token.
        top_k: draw among so many likeliest tokens; None draws among all.
        seed: of the drawing, in [-2^31, 2^32).
        stop_token: ends the text, and is not part of it.
        compute_dtype: of the computation.

    Raises:
        ValueError: if the prompt is empty, has tokens outside the vocabulary, or does not fit in the model together
            with the new tokens; or an argument cannot be used.
    """
    config = params.config
    if not prompt or min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise ValueError(f"the prompt must be token ids in [0, {config.vocab_size}), at least one; it is {prompt}")
    check_room(config, len(prompt), max_new_tokens)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a number of at least 0; 0 takes the likeliest token")
    check_seed("seed", seed)
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"top_k={top_k} must be null or lie in [1, {config.vocab_size}]")
    local = on_one_device(params)
    padding = min(_round_up(len(prompt)), config.max_seq_len) - len(prompt)
    room = min(_round_up(max_new_tokens), config.max_seq_len - len(prompt))
    with jax.set_mesh(_one_device()):
        drawn, count = _generate(
            local,
            jnp.asarray([[0] * padding + list(prompt)], jnp.int32),
            jnp.asarray(padding),
            jnp.asarray(max_new_tokens),
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(-1 if stop_token is None else stop_token),
            jax.random.key(seed),
            room,
            top_k,
            compute_dtype,
        )
    return np.asarray(drawn)[: int(count)].tolist()


type _Carry = tuple[Int[Array, " new"], Int[Array, ""], Int[Array, ""], PyTree]
"""The tokens drawn, how many they are, the next one, and the cache of those before it."""


@eqx.filter_jit
def _generate(
    params: LanguageModel,
    prompt: Int[Array, "1 S"],
    padding: Int[Array, ""],
    most: Int[Array, ""],
    temperature: Scalar,
    stop_token: Int[Array, ""],
    key: PRNGKeyArray,
    room: int,
    top_k: int | None,
    compute_dtype: ComputeDtype,
) -> tuple[Int[Array, " new"], Int[Array, ""]]:
    """Draws up to `most` tokens; returns room for `room` of them, and how many there are.

    The prompt ends where the array does. So it begins with padding, which is a document of its own.
    """
    model = cast_parameters(params, compute_dtype)
    segment_ids = jnp.where(jnp.arange(prompt.shape[1]) < padding, _PADDING, 0)[None]
    cache = model.init_cache(1, prompt.shape[1] + room, compute_dtype)
    hidden, _, cache = model.hidden(prompt, Mask(segment_ids=(segment_ids, segment_ids)), cache=cache)

    def choose(hidden: Float[Array, "1 D"], position: Int[Array, ""]) -> Int[Array, ""]:
        logits = model.unembed(hidden)[0]
        if top_k is not None:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
        drawn = jax.random.categorical(
            jax.random.fold_in(key, position), logits / jnp.where(temperature > 0, temperature, 1)
        )
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)

    def unfinished(carry: _Carry) -> Array:
        _, count, token, _ = carry
        return (count < most) & (token != stop_token)

    start = prompt.shape[1] - padding

    def step(carry: _Carry) -> _Carry:
        tokens, count, token, cache = carry
        tokens = tokens.at[count].set(token)
        hidden, _, cache = model.hidden(token[None, None], Mask(), cache=cache)
        return tokens, count + 1, choose(hidden[:, 0], start + count + 1), cache

    first = choose(hidden[:, -1], start)
    nothing = jnp.zeros(room, jnp.int32), jnp.zeros((), jnp.int32)
    tokens, count, _, _ = jax.lax.while_loop(unfinished, step, (*nothing, first, cache))
    return tokens, count


def sample(
    params: LanguageModel,
    tokenizer: "MarinTokenizer",
    prompt: str = "",
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    compute_dtype: ComputeDtype = "float32",
) -> str:
    """Continues a text until the tokenizer's end of document; see `generate` for the arguments.

    A text begins as training documents do: after the tokenizer's BOS, if it has one. An empty prompt without one
    begins after EOS. The spelling of a special token is text. With None for `max_new_tokens`, at most 128 are drawn, or
    as many as there is room for.

    Returns:
        The prompt and its continuation.

    Raises:
        ValueError: if the prompt and the new tokens do not fit in the model, or an argument cannot be used.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = [] if bos is None else [bos]
    ids = text_only(tokenizer).encode(prompt)
    if not start and not ids:
        if eos is None:
            raise ValueError("the tokenizer has neither BOS nor EOS to begin a text with: give a prompt")
        start = [eos]
    if max_new_tokens is None:
        max_new_tokens = max(1, min(_NEW_TOKENS, params.config.max_seq_len - len(start) - len(ids)))
    new = generate(
        params,
        [*start, *ids],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_token=eos,
        compute_dtype=compute_dtype,
    )
    return tokenizer.decode([*ids, *new])


def _round_up(length: int) -> int:
    return -(-length // _ROUNDED_TO) * _ROUNDED_TO


def on_one_device(params: LanguageModel) -> LanguageModel:
    """The whole model on this process's first device; if it is there already, it is not copied."""
    here = NamedSharding(_one_device(), PartitionSpec())

    def whole(leaf: Array) -> Array:
        if isinstance(leaf.sharding, NamedSharding):
            leaf = jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
        return jax.device_put(leaf.addressable_data(0), here)

    return jax.tree.map(whole, params)


def _one_device() -> Mesh:
    return Mesh(
        np.array(jax.local_devices()[:1]).reshape((1,) * len(AXIS_NAMES)),
        AXIS_NAMES,
        axis_types=(AxisType.Auto,) * len(AXIS_NAMES),
    )
