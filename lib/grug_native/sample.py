"""Text from a model: a prompt is read once, then tokens are drawn one by one against a cache of keys and values.

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
from jaxtyping import Array, Float, Int, PRNGKeyArray

from grug_native.loss import ComputeDtype
from grug_native.mesh import AXIS_NAMES
from grug_native.model import Block, Transformer, cast_parameters
from grug_native.model_config import GrugModelConfig
from grug_native.rotary import apply_rotary, rotary_tables
from grug_native.text_tokens import text_only
from grug_native.types import Scalar, check_seed

if TYPE_CHECKING:
    from levanter.tokenizers import MarinTokenizer

_NEW_TOKENS = 128
"""Drawn if nobody says how many."""
_ROUNDED_TO = 64
"""Lengths are rounded up to a multiple of this many positions, so that few of them are compiled."""


class KVCache(eqx.Module):
    """Keys and values of all layers, at the positions read so far; what stands behind them means nothing."""

    keys: Float[Array, "L B K N E"]
    """Rotated keys."""
    values: Float[Array, "L B K N E"]
    """Values."""

    @staticmethod
    def empty(config: GrugModelConfig, *, batch: int, length: int, dtype: ComputeDtype) -> "KVCache":
        """A cache with room for `length` positions."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.features_per_head)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def extend(
    params: Transformer, tokens: Int[Array, "B S"], start: Int[Array, ""], cache: KVCache
) -> tuple[Float[Array, "B S V"], KVCache]:
    """Reads `tokens` at the positions from `start` on, after what the cache holds. On one device, under no mesh.

    Args:
        params: the model; its dtype is that of the computation.
        tokens: as many at a time as you like.
        start: position of the first of them. Later entries of the cache are overwritten.
        cache: of the positions before.

    Returns:
        The logits of the next token after each position, in f32, and the longer cache.
    """
    config, length = params.config, cache.keys.shape[2]
    positions = start + jnp.arange(tokens.shape[1])
    cos, sin = (table[positions] for table in rotary_tables(config.rope, config.features_per_head, length))
    visible = jnp.arange(length)[None, :] <= positions[:, None]

    def apply(
        x: Float[Array, "B S D"], layer: tuple[Block, Float[Array, "B K N E"], Float[Array, "B K N E"]]
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "B K N E"], Float[Array, "B K N E"]]]:
        block, keys, values = layer
        attn, normed = block.attn, block.attn_norm(x, eps=config.layer_norm_eps)
        q, k, v = (
            (normed @ weight).reshape(*x.shape[:2], -1, config.features_per_head)
            for weight in (attn.wq, attn.wk, attn.wv)
        )
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, start, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, start, axis=1)
        x = x + _attend(q, keys, values, visible).reshape(*x.shape[:2], -1) @ attn.wo
        x = x + block.mlp(block.mlp_norm(x, eps=config.layer_norm_eps))
        return x, (keys, values)

    x, (keys, values) = jax.lax.scan(apply, params.embed[tokens], (params.blocks, cache.keys, cache.values))
    hidden = params.final_norm(x, eps=config.layer_norm_eps)
    return jnp.matmul(hidden, params.lm_head, preferred_element_type=jnp.float32), KVCache(keys, values)


def _attend(
    q: Float[Array, "B S H E"], k: Float[Array, "B K N E"], v: Float[Array, "B K N E"], visible: Array
) -> Float[Array, "B S H E"]:
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("bsnge,bkne->bngsk", groups / math.sqrt(q.shape[3]), k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores, -1e9), axis=-1).astype(v.dtype)
    return jnp.einsum("bngsk,bkne->bsnge", weights, v).reshape(q.shape)


def check_room(config: GrugModelConfig, prompt_tokens: int, max_new_tokens: int) -> None:
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
    params: Transformer,
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
    length = min(_round_up(len(prompt) + max_new_tokens), config.max_seq_len)
    tokens = np.zeros(length, np.int32)
    tokens[: len(prompt)] = prompt
    with jax.set_mesh(_one_device()):
        drawn, end = _generate(
            local,
            jnp.asarray(tokens),
            jnp.asarray(len(prompt)),
            jnp.asarray(len(prompt) + max_new_tokens),
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(-1 if stop_token is None else stop_token),
            jax.random.key(seed),
            min(_round_up(len(prompt)), length),
            top_k,
            compute_dtype,
        )
    return np.asarray(drawn)[len(prompt) : int(end)].tolist()


type _Carry = tuple[Int[Array, " K"], Int[Array, ""], Int[Array, ""], KVCache]
"""The tokens, how many of them stand, the next one, and the cache of those before it."""


@eqx.filter_jit
def _generate(
    params: Transformer,
    tokens: Int[Array, " K"],
    start: Int[Array, ""],
    last: Int[Array, ""],
    temperature: Scalar,
    stop_token: Int[Array, ""],
    key: PRNGKeyArray,
    prompt_room: int,
    top_k: int | None,
    compute_dtype: ComputeDtype,
) -> tuple[Int[Array, " K"], Int[Array, ""]]:
    """Fills in `tokens` from `start` on; returns where they end. `prompt_room` positions are read at once."""
    params = cast_parameters(params, compute_dtype)
    cache = KVCache.empty(params.config, batch=1, length=tokens.shape[0], dtype=compute_dtype)
    logits, cache = extend(params, tokens[None, :prompt_room], jnp.zeros((), jnp.int32), cache)

    def choose(logits: Float[Array, " V"], end: Int[Array, ""]) -> Int[Array, ""]:
        if top_k is not None:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
        drawn = jax.random.categorical(
            jax.random.fold_in(key, end), logits / jnp.where(temperature > 0, temperature, 1)
        )
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)

    def unfinished(carry: _Carry) -> Array:
        _, end, token, _ = carry
        return (end < last) & (token != stop_token)

    def step(carry: _Carry) -> _Carry:
        tokens, end, token, cache = carry
        tokens = tokens.at[end].set(token)
        logits, cache = extend(params, token[None, None], end, cache)
        return tokens, end + 1, choose(logits[0, 0], end + 1), cache

    first = choose(logits[0, start - 1], start)
    tokens, end, _, _ = jax.lax.while_loop(unfinished, step, (tokens, start, first, cache))
    return tokens, end


def sample(
    params: Transformer,
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


def on_one_device(params: Transformer) -> Transformer:
    """The whole model on this process's first device; if it is there already, it is not copied."""
    here = NamedSharding(_one_device(), PartitionSpec())

    def whole(leaf: Array) -> Array:
        if isinstance(leaf.sharding, NamedSharding):
            leaf = jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
        return jax.device_put(leaf.addressable_data(0), here)

    return jax.tree.map(whole, params)


def _one_device() -> Mesh:
    return Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1), AXIS_NAMES, axis_types=(AxisType.Auto,) * 3)
