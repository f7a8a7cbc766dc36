"""A model as lm-eval sees a model: texts in, log-likelihoods and continuations out.

Importing this module imports lm-eval, which takes seconds; nothing light may import it.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final, override

from levanter.tokenizers import MarinTokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from grug_native.data.text_tokens import text_only
from grug_native.evaluation.drawing import Sampling
from grug_native.evaluation.generate import Prompt, Sampler
from grug_native.evaluation.scoring import Request, Scorer
from grug_native.evaluation.until import cut_text, end_of_text
from grug_native.types import check_seed

_DEFAULT_NEW_TOKENS = 256
"""Of a generation task that names no limit; half a row, where rows are short."""


class Settings(NamedTuple):
    """How a text is continued."""

    until: list[str]
    """Texts that end it."""
    max_new_tokens: int
    """Tokens at most."""
    sampling: Sampling
    """How each is drawn."""
    seed: int
    """Of the drawing, with what tells the request from others."""


@final
@dataclass(frozen=True, eq=False)
class RequestEncoder:
    """What requests of lm-eval are to a model of a given length; made by `encoder_of`.

    A document begins as in training: after the tokenizer's BOS, if it has one. What has no context is scored after
    BOS, or else after EOS, which stands between training documents. The spelling of a special token is text.
    """

    text: MarinTokenizer
    """Makes no special tokens."""
    max_length: int
    """Tokens that the model is given at most."""
    eos: int
    """Id of the token that ends a document."""
    start: list[int]
    """BOS, if there is one."""

    @property
    def prefix(self) -> int:
        """Id of the token after which a text without context is scored."""
        return [*self.start, self.eos][0]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Contexts and continuations, all texts tokenized in one batch. A context of spaces alone becomes empty."""
        moved = [_move_spaces(context, continuation) for context, continuation in pairs]
        contexts = list(dict.fromkeys(context for context, _ in moved))
        context_ids = dict(zip(contexts, self.text.encode_batch(contexts), strict=True))
        whole_ids = self.text.encode_batch([context + continuation for context, continuation in moved])
        requests: list[Request] = []
        for (given, _), (context, _), whole in zip(pairs, moved, whole_ids, strict=True):
            ids = context_ids[context]
            before = [*self.start, *ids] if given else [self.prefix]
            requests.append(Request(before, whole[len(ids) :]))
        return requests

    def settings(self, given: dict[str, Any]) -> Settings:
        """Reads a task's `generation_kwargs`; a `ValueError` says what cannot be done with them."""
        arguments: dict[str, Any] = dict(normalize_gen_kwargs(given, min(_DEFAULT_NEW_TOKENS, self.max_length // 2)))
        stops: list[Any] = list(handle_stop_sequences(arguments.pop("until"), eos=self.text.eos_token))
        until = [stop for stop in stops if stop != ""]
        if strange := [stop for stop in until if not isinstance(stop, str)]:
            raise ValueError(f"generation_kwargs until={strange[0]!r} is no text: put it in quotes")
        max_new_tokens, is_drawn = arguments.pop("max_gen_toks"), arguments.pop("do_sample")
        temperature, numbers = arguments.pop("temperature", 1.0 if is_drawn else 0.0), dict[str, Any]()
        for name, kind in (("top_k", int), ("top_p", float), ("seed", int)):
            if (value := arguments.pop(name, None)) is not None:
                numbers[name] = kind(value)
        if is_drawn and arguments:
            raise ValueError(
                f"generation_kwargs {sorted(arguments)} are not supported: sample by temperature, top_k, top_p and seed"
            )
        if max_new_tokens >= self.max_length:
            raise ValueError(
                f"generation_kwargs max_gen_toks={max_new_tokens} leaves no room for a prompt in the {self.max_length} "
                "positions of the model: lower it"
            )
        if max_new_tokens < 1:
            raise ValueError(f"generation_kwargs max_gen_toks={max_new_tokens} must be positive")
        seed = numbers.pop("seed", 0)
        check_seed("generation_kwargs seed", seed)
        sampling = Sampling(temperature=temperature, **numbers) if is_drawn else Sampling(temperature=0.0)
        sampling.check_vocabulary(len(self.text))
        return Settings(until, max_new_tokens, sampling, seed)

    def settings_of(self, instance: Instance) -> Settings:
        """Those of a request; a `ValueError` names the task and the document too."""
        try:
            return self.settings(instance.args[1])
        except ValueError as error:
            raise _refusal(instance, str(error)) from error

    def prompts(self, contexts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts to continue, whole."""
        return [[*self.start, *ids] or [self.prefix] for ids in self.text.encode_batch(list(contexts))]

    def check(self, instances: Sequence[Instance]) -> None:
        """Refuses requests that the model cannot answer.

        Raises:
            ValueError: names the task, the document, and what is wrong with it.
        """
        scored = [instance for instance in instances if instance.request_type in ("loglikelihood", "multiple_choice")]
        for instance, request in zip(scored, self.pairs([instance.args for instance in scored]), strict=True):
            if not request.context:
                raise _refusal(
                    instance,
                    "its context is white space only, which is no token to score after: leave it empty, or put a word "
                    "in doc_to_text",
                )
            if len(request.continuation) > self.max_length:
                raise _refusal(
                    instance,
                    f"choice {instance.idx} has {len(request.continuation)} tokens, and the model takes "
                    f"{self.max_length} at most: leave the document or the task out, or give a model with a longer "
                    "model.max_seq_len",
                )
        for instance in instances:
            if instance.request_type == "generate_until":
                self.settings_of(instance)


def encoder_of(tokenizer: MarinTokenizer, max_length: int) -> RequestEncoder:
    """Makes what encodes requests for a model that is given `max_length` tokens at most.

    Raises:
        ValueError: if the tokenizer has no EOS token, which ends a document.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token, and the harness needs one")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return RequestEncoder(text_only(tokenizer), max_length, tokenizer.eos_token_id, start)


def _refusal(instance: Instance, what: str) -> ValueError:
    return ValueError(f"eval.harness.tasks: task {instance.task_name!r}, document {instance.doc_id}: {what}")


@final
class GrugLM(TemplateLM):
    """A model for lm-eval's tasks. All processes of a run are given the same requests, and find the same answers."""

    def __init__(self, scorer: Scorer, tokenizer: MarinTokenizer):
        """Takes what computes, and what turns text into its tokens; raises as `encoder_of` does."""
        super().__init__()
        self.tokens = 0
        """Positions of the model that requests for log-likelihoods have taken so far."""
        self.requests: Counter[str] = Counter()
        """By task, the requests so far that have a context."""
        self.cut: Counter[str] = Counter()
        """By task, those of them whose context has lost its beginning, to fit into the model."""
        self._scorer = scorer
        self._encoder = encoder_of(tokenizer, scorer.row_length)
        self._sampler = Sampler(scorer.params, scorer.mesh, scorer.batch_size, scorer.compute_dtype)

    @property
    @override
    def eot_token_id(self) -> int:
        """Id of the token that ends a document."""
        return self._encoder.eos

    @property
    @override
    def prefix_token_id(self) -> int:
        """Id of the token after which a text without context is scored."""
        return self._encoder.prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model is given at most."""
        return self._encoder.max_length

    @property
    @override
    def tokenizer_name(self) -> str:
        """Names the tokenizer to lm-eval."""
        return self._encoder.text.name_or_path

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Token ids of a text that begins a document; of one in its middle, if `add_special_tokens` is False."""
        start = [] if add_special_tokens is False else self._encoder.start
        return [*start, *self._encoder.text.encode(string)]

    @override
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores (context, continuation) pairs: what the base class does, but texts are tokenized in one batch."""
        encoded = self._encoder.pairs([request.args for request in requests])
        for instance, request in zip(requests, encoded, strict=True):
            taken = len(request.context) + len(request.continuation) - 1
            self._count(instance, cut=taken > self.max_length and bool(request.continuation))
        return self._score(encoded)

    @override
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        return self._score([Request(context, continuation) for _, context, continuation in requests])

    @override
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows of the model's length.

        A window's tokens are predicted from those before them in the window; the last window is full, and scores only
        what no other has.
        """
        texts = self._encoder.text.encode_batch([request.args[0] for request in requests])
        windows = [
            [
                Request(*make_disjoint_window(window))
                for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            ]
            for ids in texts
        ]
        scores = iter(self._score([window for text in windows for window in text]))
        return [sum((next(scores)[0] for _ in text), 0.0) for text in windows]

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts, greedily or by sampling, until a stop string, EOS, or so many tokens.

        A text that is drawn depends on its task, its document and which of its repeats it is, and not on the others.
        """
        settings = [self._encoder.settings_of(request) for request in requests]
        repeats, prompts = Counter[str](), list[Prompt]()
        contexts = self._encoder.prompts([request.args[0] for request in requests])
        for request, own, ids in zip(requests, settings, contexts, strict=True):
            room = self.max_length - own.max_new_tokens
            self._count(request, cut=len(ids) > room)
            name = f"{request.task_name}/{request.doc_id}/{request.idx}/{own.seed}"
            seed = zlib.crc32(f"{name}/{repeats[name]}".encode())
            repeats[name] += 1
            is_over = partial(self._is_over, own.until)
            prompts.append(Prompt(ids[-room:], own.max_new_tokens, own.sampling, seed, self._encoder.eos, is_over))
        drawn = self._sampler.draw(prompts)
        return [cut_text(self._encoder.text.decode(ids), own.until) for ids, own in zip(drawn, settings, strict=True)]

    def _is_over(self, until: Sequence[str], ids: list[int]) -> bool:
        return end_of_text(self._encoder.text.decode(ids), until) is not None

    def _count(self, request: Instance, *, cut: bool) -> None:
        self.requests[str(request.task_name)] += 1
        self.cut[str(request.task_name)] += cut

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        self.tokens += sum(map(self._scorer.positions, requests))
        return [(score.log_likelihood, score.is_greedy) for score in self._scorer.score(requests)]


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the word that follows."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
