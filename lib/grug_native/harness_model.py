"""A `Transformer` as lm-eval sees a model: texts in, log-likelihoods and continuations out.

Importing this module imports lm-eval, which takes seconds; nothing light may import it.
"""

from collections.abc import Sequence
from typing import Any, final, override

from levanter.tokenizers import MarinTokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from grug_native.model import Transformer
from grug_native.sample import generate, on_one_device
from grug_native.scoring import Request, Scorer
from grug_native.signals import leave_if_told_to_stop
from grug_native.text_tokens import text_only

_DEFAULT_NEW_TOKENS = 256
"""Of a generation task that names no limit; half a row, where rows are short."""


@final
class GrugLM(TemplateLM):
    """A model for lm-eval's tasks. All processes of a run are given the same requests, and find the same answers.

    A document begins as in training: after the tokenizer's BOS, if it has one. What has no context is scored after
    BOS, or else after EOS, which stands between training documents.
    """

    def __init__(self, scorer: Scorer, tokenizer: MarinTokenizer):
        """Takes what computes, and what turns text into its tokens.

        Raises:
            ValueError: if the tokenizer has no EOS token, which ends a document.
        """
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token, and the harness needs one")
        self.tokens = 0
        """Positions of the model that requests for log-likelihoods have taken so far."""
        self._scorer = scorer
        self._text = text_only(tokenizer)
        self._eos = tokenizer.eos_token_id
        self._document_start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    @property
    @override
    def eot_token_id(self) -> int:
        """Id of the token that ends a document."""
        return self._eos

    @property
    @override
    def prefix_token_id(self) -> int:
        """Id of the token after which a text without context is scored."""
        return [*self._document_start, self._eos][0]

    @property
    def max_length(self) -> int:
        """Tokens that the model is given at most."""
        return self._scorer.row_length

    @property
    @override
    def tokenizer_name(self) -> str:
        """Names the tokenizer to lm-eval."""
        return self._text.name_or_path

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Token ids of a text that begins a document; of one in its middle, if `add_special_tokens` is False."""
        return [*([] if add_special_tokens is False else self._document_start), *self._text.encode(string)]

    @override
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores (context, continuation) pairs: what the base class does, but texts are tokenized in one batch."""
        pairs: list[tuple[str, str]] = [request.args for request in requests]
        moved = [_move_spaces(context, continuation) for context, continuation in pairs]
        contexts = list(dict.fromkeys(context for context, _ in moved))
        context_ids = dict(zip(contexts, self._text.encode_batch(contexts), strict=True))
        whole_ids = self._text.encode_batch([context + continuation for context, continuation in moved])
        encoded: list[tuple[tuple[str, str], list[int], list[int]]] = []
        for pair, (context, _), whole in zip(pairs, moved, whole_ids, strict=True):
            ids = context_ids[context]
            start = self._document_start if context else []
            encoded.append((pair, [*start, *ids], whole[len(ids) :]))
        return self._loglikelihood_tokens(encoded)

    @override
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        prefix = [self.prefix_token_id]

        def request(context: list[int], continuation: list[int]) -> Request:
            if not context and continuation[:1] == prefix:
                return Request(prefix, continuation[1:])
            return Request(context or prefix, continuation)

        return self._score([request(context, continuation) for _, context, continuation in requests])

    @override
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows of the model's length.

        A window's tokens are predicted from those before them in the window; the last window is full, and scores only
        what no other has.
        """
        texts = self._text.encode_batch([request.args[0] for request in requests])
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
        """Continues texts one by one, greedily or by sampling at a temperature, until a stop string or EOS."""
        params = on_one_device(self._scorer.params)
        return [self._generate(params, *request.args, seed=number) for number, request in enumerate(requests)]

    def _generate(self, params: Transformer, context: str, settings: dict[str, Any], *, seed: int) -> str:
        leave_if_told_to_stop()
        arguments: dict[str, Any] = dict(normalize_gen_kwargs(settings, min(_DEFAULT_NEW_TOKENS, self.max_length // 2)))
        until = handle_stop_sequences(arguments.pop("until"), eos=self._text.eos_token)
        max_new_tokens, sampling = arguments.pop("max_gen_toks"), arguments.pop("do_sample")
        temperature, top_k = arguments.pop("temperature", 1.0 if sampling else 0.0), arguments.pop("top_k", None)
        if sampling and arguments:
            raise ValueError(
                f"generation_kwargs {sorted(arguments)} are not supported: sample by temperature and top_k"
            )
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(
                f"generation_kwargs max_gen_toks={max_new_tokens} leaves no room for a prompt in the {self.max_length} "
                "positions of the model: lower it"
            )
        ids = generate(
            params,
            self.tok_encode(context)[-room:] or [self.prefix_token_id],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            stop_token=self._eos,
            compute_dtype=self._scorer.compute_dtype,
        )
        return postprocess_generated_text(self._text.decode(ids), until, None)

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        self.tokens += sum(map(self._scorer.positions, requests))
        return [(score.log_likelihood, score.is_greedy) for score in self._scorer.score(requests)]


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the word that follows."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
