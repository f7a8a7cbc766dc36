"""Text from a model, many at once: one pass reads the prompts, then each step draws a token of every text.

All devices of a mesh take part: the texts are split over the batch axes, and each device has whole weights, but for
what tensor and expert parallelism split. Everything here is the same on every process of a run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from grug_native.attention import Mask
from grug_native.evaluation.drawing import Rule, Sampling, draw, rule_of
from grug_native.host.signals import leave_if_told_to_stop
from grug_native.kernels.backend import current_backend
from grug_native.language_model import LanguageModel, ModelConfig
from grug_native.loss import ComputeDtype
from grug_native.sharding import BATCH_AXES, batch_shards, create_mesh, explicit_mesh, put_batch, reshard
from grug_native.types import Scalar, check_seed

_PADDING = -1
"""Segment of what stands before a prompt, so that prompts of one batch end together."""
_STEPS = 16
"""Tokens of each text that are drawn before anybody looks at them."""
_CACHE_SHARE = 1 / 8
"""Of a device's memory: more texts than whose caches fit into it are not drawn at once."""


class Prompt(NamedTuple):
    """A text to continue."""

    ids: Sequence[int]
    """Its tokens, at least one."""
    max_new_tokens: int
    """At most so many are drawn."""
    sampling: Sampling = Sampling()
    """How they are drawn."""
    seed: int = 0
    """Of the drawing, in [-2^31, 2^32)."""
    stop_token: int | None = None
    """Ends the text, and is not part of it."""
    is_over: Callable[[list[int]], bool] | None = None
    """Asked now and then, with the new tokens, whether the text may end here."""


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


@final
@dataclass(frozen=True, eq=False)
class Sampler:
    """Continues texts with one set of parameters.

    A text is a function of its own prompt: which others are drawn with it, and on how many devices, changes the
    rounding of its logits and nothing else.
    """

    params: LanguageModel
    """Laid out over the mesh."""
    mesh: Mesh
    """The mesh on which the parameters lie."""
    batch_size: int
    """Texts at once at most over all devices, rounded up to what divides over them."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of the forward pass."""

    def draw(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Draws the tokens that follow each prompt, in any number and of any length.

        Where a prompt has an `is_over`, up to 15 tokens may follow on the one with which it is.

        Raises:
            ValueError: if a prompt is empty, has tokens outside the vocabulary, or does not fit in the model together
                with the new tokens; or a setting cannot be used.
        """
        for prompt in prompts:
            self._check(prompt)
        new: list[list[int]] = [[] for _ in prompts]
        with jax.set_mesh(self.mesh):
            for batch in self._batches(prompts):
                for index, ids in zip(batch, self._draw_batch([prompts[index] for index in batch]), strict=True):
                    new[index] = ids
        return new

    def _check(self, prompt: Prompt) -> None:
        config = self.params.config
        if not prompt.ids or min(prompt.ids) < 0 or max(prompt.ids) >= config.vocab_size:
            raise ValueError(
                f"the prompt must be token ids in [0, {config.vocab_size}), at least one; it is {prompt.ids}"
            )
        check_room(config, len(prompt.ids), prompt.max_new_tokens)
        check_seed("seed", prompt.seed)
        prompt.sampling.check_vocabulary(config.vocab_size)

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Texts of one kind together, and then those of one length: the longest first."""
        kinds: dict[Sampling, list[int]] = {}
        for index, prompt in enumerate(prompts):
            kinds.setdefault(prompt.sampling, []).append(index)
        for kind in kinds.values():
            kind.sort(key=lambda index: (-_round_up(prompts[index].max_new_tokens), -len(prompts[index].ids), index))
            while kind:
                longest = prompts[kind[0]]
                rows = self._most_rows(self._width(longest) + _round_up(longest.max_new_tokens))
                yield kind[:rows]
                del kind[:rows]

    def _width(self, prompt: Prompt) -> int:
        return min(_round_up(len(prompt.ids)), self.params.config.max_seq_len)

    def _most_rows(self, positions: int) -> int:
        """Texts of so many positions that are drawn at once."""
        shards, memory = batch_shards(self.mesh), current_backend().memory
        most = -(-self.batch_size // shards) * shards
        if memory is None:
            return most
        cache = eqx.filter_eval_shape(lambda: self.params.init_cache(shards, positions, self.compute_dtype))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) // shards
        return min(most, max(1, int(_CACHE_SHARE * memory) // size) * shards)

    @cached_property
    def _weights(self) -> LanguageModel:
        """The model as it computes: gathered and cast once, and not for each token."""
        return _gathered(self.params, self.compute_dtype)

    def _draw_batch(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        sampling, shards = prompts[0].sampling, batch_shards(self.mesh)
        rows = shards << max(0, -(-len(prompts) // shards) - 1).bit_length()
        width = max(map(self._width, prompts))
        tokens = np.zeros((rows, width), np.int32)
        lengths, most, stops = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
        seeds = np.zeros(rows, np.uint32)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt.ids) :], lengths[row] = prompt.ids, len(prompt.ids)
            most[row], seeds[row] = prompt.max_new_tokens, prompt.seed % 2**32
            stops[row] = -1 if prompt.stop_token is None else prompt.stop_token
        texts = _Texts(*(put_batch(array, self.mesh) for array in (lengths, most, stops, seeds)))
        rule, knobs = rule_of(sampling), (np.float32(sampling.temperature), np.float32(sampling.top_p or 1.0))
        state, drawn = _read_prompts(
            self._weights,
            put_batch(tokens, self.mesh),
            texts,
            knobs,
            rule=rule,
            room=_round_up(int(most.max())),
            dtype=self.compute_dtype,
        )
        new: list[list[int]] = [[] for _ in prompts]
        alive = np.arange(rows) < len(prompts)
        while True:
            for row, ids in enumerate(jax.device_get(drawn)[: len(prompts)].tolist()):
                if alive[row]:
                    alive[row] = not _add(new[row], ids, prompts[row])
            if not alive.any():
                return new
            leave_if_told_to_stop()
            state, drawn = _extend(self._weights, state, put_batch(alive, self.mesh), texts, knobs, rule=rule)


def _add(new: list[int], drawn: Sequence[int], prompt: Prompt) -> bool:
    """Adds what was drawn to a text; returns whether it has ended."""
    for token in drawn:
        if token == prompt.stop_token:
            return True
        new.append(token)
        if len(new) == prompt.max_new_tokens:
            return True
    return prompt.is_over is not None and prompt.is_over(new)


class _Texts(eqx.Module):
    """What does not change from step to step."""

    lengths: Int[Array, " B"]
    """Tokens of the prompts."""
    most: Int[Array, " B"]
    """New tokens at most."""
    stops: Int[Array, " B"]
    """Tokens that end the texts; -1 for none."""
    seeds: UInt[Array, " B"]
    """Of the drawing."""


class _State(eqx.Module):
    """Where the texts of a batch have got to."""

    cache: PyTree
    """Of all tokens but the newest."""
    newest: Int[Array, " B"]
    """Drawn, and not read yet."""
    count: Int[Array, ""]
    """New tokens of each."""


type _Knobs = tuple[Scalar, Scalar]
"""Temperature and `top_p`."""


@partial(jax.jit, static_argnames=("rule", "room", "dtype"))
def _read_prompts(
    model: LanguageModel, tokens: Int[Array, "B S"], texts: _Texts, knobs: _Knobs, *, rule: Rule, room: int, dtype: str
) -> tuple[_State, Int[Array, "B 1"]]:
    """Reads prompts that end where the array does, and draws the first token of each.

    So they begin with padding, which is a document of its own.
    """
    batch, width = tokens.shape
    is_padding = jnp.arange(width)[None] < (width - texts.lengths)[:, None]
    segment_ids = jnp.where(is_padding, _PADDING, 0)
    cache = model.init_cache(batch, width + room, dtype)
    hidden, _, cache = model.hidden(tokens, Mask(segment_ids=(segment_ids, segment_ids)), cache=cache)
    newest = _choose(model, hidden[:, -1], texts, jnp.zeros((), jnp.int32), knobs, rule)
    return _State(cache, newest, jnp.ones((), jnp.int32)), reshard(newest, None)[:, None]


@partial(jax.jit, static_argnames="rule", donate_argnames="state")
def _extend(
    model: LanguageModel, state: _State, alive: Bool[Array, " B"], texts: _Texts, knobs: _Knobs, *, rule: Rule
) -> tuple[_State, Int[Array, "B steps"]]:
    """Draws some more tokens of each text, or fewer where all of them end; what stands behind an end means nothing."""

    def unfinished(carry: tuple[_State, Array, Array, Array]) -> Array:
        _, alive, number, _ = carry
        return (number < _STEPS) & jnp.any(alive)

    def step(carry: tuple[_State, Array, Array, Array]) -> tuple[_State, Array, Array, Array]:
        state, alive, number, drawn = carry
        hidden, _, cache = model.hidden(state.newest[:, None], Mask(), cache=state.cache)
        newest = _choose(model, hidden[:, 0], texts, state.count, knobs, rule)
        drawn = jax.lax.dynamic_update_slice_in_dim(drawn, newest[:, None], number, axis=1)
        count = state.count + 1
        alive = alive & (newest != texts.stops) & (count < texts.most)
        return _State(cache, newest, count), alive, number + 1, drawn

    room = reshard(jnp.zeros((state.newest.size, _STEPS), jnp.int32), BATCH_AXES, None)
    start = state, alive, jnp.zeros((), jnp.int32), room
    state, _, _, drawn = jax.lax.while_loop(unfinished, step, start)
    return state, reshard(drawn, None, None)


def _choose(
    model: LanguageModel,
    hidden: Float[Array, "B D"],
    texts: _Texts,
    count: Int[Array, ""],
    knobs: _Knobs,
    rule: Rule,
) -> Int[Array, " B"]:
    logits = reshard(model.unembed(hidden), BATCH_AXES, None)
    return draw(logits, texts.seeds, texts.lengths + count, rule, *knobs)


@partial(jax.jit, static_argnames="dtype")
def _gathered(params: LanguageModel, dtype: str) -> LanguageModel:
    """The weights in `dtype`, and no longer split over `data`."""

    def whole(leaf: Array) -> Array:
        leaf = leaf.astype(dtype)
        if not explicit_mesh():
            return leaf
        axes = jax.typeof(leaf).sharding.spec
        return reshard(leaf, *(None if axis == "data" else axis for axis in axes)) if "data" in axes else leaf

    return jax.tree.map(whole, params)


def _round_up(length: int) -> int:
    """Lengths are rounded up, by less than a quarter, so that few of them are compiled."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def generate(
    params: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    compute_dtype: ComputeDtype = "float32",
) -> list[int]:
    """Draws the tokens that follow one prompt, as token ids.

    Args:
        params: the model, on the mesh where it lies, or on this process's first device if it lies on none. Of several
            processes, each must call this.
        prompt: token ids, at least one.
        max_new_tokens: at most so many are drawn.
        temperature: as in `Sampling`; 0 takes the likeliest token.
        top_k: as in `Sampling`.
        top_p: as in `Sampling`.
        seed: of the drawing, in [-2^31, 2^32).
        stop_token: ends the text, and is not part of it.
        compute_dtype: of the computation.

    Raises:
        ValueError: as `Sampler.draw` does.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    wanted = Prompt(prompt, max_new_tokens, sampling, seed, stop_token)
    return sampler_of(params, compute_dtype=compute_dtype).draw([wanted])[0]


def sampler_of(params: LanguageModel, *, batch_size: int = 1, compute_dtype: ComputeDtype = "float32") -> Sampler:
    """A sampler on the mesh where the parameters lie; on this process's first device, if they lie on none."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return Sampler(params, sharding.mesh, batch_size, compute_dtype)
    mesh = create_mesh(1, devices=jax.local_devices()[:1])
    return Sampler(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), mesh, batch_size, compute_dtype)
