import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from levanter.data.dataset import ListAsyncDataset
from levanter.data.text.examples import GrugLmExample
from levanter.grug.attention import AttentionMask
from levanter.tokenizers import HfMarinTokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from grug_native.evaluation.generate import generate
from grug_native.evaluation.harness_lm import GrugLM
from grug_native.evaluation.perplexity import build_tagged_evaluator
from grug_native.evaluation.scoring import Request, Scorer
from grug_native.model import Transformer
from grug_native.sharding import create_mesh
from tests.fixtures_data import WORDS, make_text
from tests.fixtures_run import SMALL_MODEL
from tests.tolerance import loss_terms, tolerance

if TYPE_CHECKING:
    pass

ROW = SMALL_MODEL.max_seq_len
TERMS = loss_terms(SMALL_MODEL, ROW, ROW)
TEXTS = [make_text(seed, 8 * seed) for seed in range(1, 6)] + ["ö", "日本 🐕", "grug " * 31]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    mesh = create_mesh(4)
    with jax.set_mesh(mesh):
        params = Transformer.init(replace(SMALL_MODEL, initializer_std=0.3), key=jax.random.key(0))
    return Scorer(params, mesh, ROW, 4)


@pytest.fixture(scope="module")
def model(scorer: Scorer, tokenizer: HfMarinTokenizer) -> GrugLM:
    return GrugLM(scorer, tokenizer)


def _instances(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=0, metadata=("task", index, 1))
        for index, argument in enumerate(arguments)
    ]


def test_pairs_are_encoded_as_lm_eval_encodes_them(model: GrugLM, tokenizer: HfMarinTokenizer) -> None:
    pairs = [
        ("", " grug brain"),
        ("", f"{tokenizer.eos_token}grug"),  # text, spelled out
        ("grug ", "brain"),
        ("grug say \n", "demon"),
        ("complexity very", " bad"),
        ("complexity ver", "y bad"),  # its tokens straddle the border
        ("日本 " * 40, "ögg"),
        ("grug", " " + " ".join(WORDS[:3])),
    ]
    requests = _instances("loglikelihood", pairs)
    assert model.loglikelihood(requests) == TemplateLM.loglikelihood(model, requests)
    # lm-eval's own model refuses a context of spaces alone too.
    with pytest.raises(ValueError, match="there must be a context"):
        model.loglikelihood(_instances("loglikelihood", [("  ", "grug")]))
    assert model.loglikelihood([]) == []
    assert model.loglikelihood(_instances("loglikelihood", [("grug", "")])) == [(0.0, True)]


def test_rolling_equals_a_reference_written_by_hand(model: GrugLM, scorer: Scorer, tokenizer: HfMarinTokenizer) -> None:
    found = model.loglikelihood_rolling(_instances("loglikelihood_rolling", [(text,) for text in [*TEXTS, ""]]))
    assert found[-1] == 0.0
    assert tokenizer.eos_token_id is not None
    for text, total in zip(TEXTS, found[:-1], strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        expected = 0.0
        for target in range(1, len(ids)):
            # Windows hold ROW targets each; the last is moved back until it is full.
            start = min((target - 1) // ROW * ROW, max(len(ids) - 1 - ROW, 0))
            [score] = scorer.score([Request(ids[start:target], ids[target : target + 1])])
            expected += score.log_likelihood
        assert total == pytest.approx(expected, abs=tolerance(TERMS, expected))


def test_bits_per_byte_of_documents_equal_those_of_the_evaluation(
    model: GrugLM, scorer: Scorer, tokenizer: HfMarinTokenizer
) -> None:
    texts = [text for text in TEXTS if len(tokenizer.encode(text)) < ROW]
    eos = tokenizer.eos_token_id
    assert eos is not None
    assert len(texts) >= 3
    examples: list[GrugLmExample] = []
    for text in texts:
        ids = tokenizer.encode(text)
        tokens = np.array([eos, *ids] + [0] * (ROW - 1 - len(ids)), np.int32)
        weight = (np.arange(ROW) < len(ids)).astype(np.float32)
        examples.append(GrugLmExample(jnp.asarray(tokens), jnp.asarray(weight), AttentionMask.causal()))
    evaluation = build_tagged_evaluator(
        [(ListAsyncDataset(examples), ["documents"])],
        batch_size=4,
        mesh=scorer.mesh,
        vocab_size=SMALL_MODEL.vocab_size,
        tokenizer=tokenizer,
    )
    rolling = model.loglikelihood_rolling(_instances("loglikelihood_rolling", [(text,) for text in texts]))
    theirs = -sum(rolling) / sum(len(text.encode()) for text in texts) / math.log(2)
    assert evaluation.evaluate(scorer.params)["eval/bpb_exact"] == pytest.approx(theirs, abs=tolerance(TERMS, theirs))


def test_generation_stops_where_the_task_says(model: GrugLM, scorer: Scorer, tokenizer: HfMarinTokenizer) -> None:
    prompt = "grug brain say"
    ids = generate(scorer.params, tokenizer.encode(prompt), max_new_tokens=12, temperature=0.0)
    text = tokenizer.decode(ids)
    eos = str(tokenizer.eos_token)
    mark = next(character for character in text[1:] if character.isascii() and character.isalnum())
    settings = [
        {"until": [], "max_gen_toks": 12},
        {"until": mark, "max_gen_toks": 12, "do_sample": False},
        {"until": ["never said"], "max_gen_toks": 3, "temperature": 0.0},
    ]
    free, stopped, short = model.generate_until(_instances("generate_until", [(prompt, s) for s in settings]))
    assert free == text.split(eos)[0]  # which is where EOS ends it
    assert stopped == text.split(mark)[0] != free
    assert short == tokenizer.decode(ids[:3])
    long = model.generate_until(_instances("generate_until", [("brain " * 40 + prompt, {"max_gen_toks": 12})]))
    kept = tokenizer.encode("brain " * 40 + prompt)[-(ROW - 12) :]
    assert long == [
        tokenizer.decode(
            generate(scorer.params, kept, max_new_tokens=12, temperature=0.0, stop_token=tokenizer.eos_token_id)
        )
    ]
    sampled = model.generate_until(
        _instances("generate_until", [(prompt, {"until": [], "do_sample": True, "max_gen_toks": 12})] * 2)
    )
    assert len({*sampled, free}) == 3


def test_an_answer_does_not_depend_on_the_other_requests(model: GrugLM) -> None:
    kinds: list[dict[str, Any]] = [
        {"until": ["a"], "max_gen_toks": 12},
        {"until": [], "do_sample": True, "max_gen_toks": 9},
        {"until": ["ö", "\n"], "do_sample": True, "top_k": 40, "top_p": 0.8, "temperature": 0.5, "max_gen_toks": 9},
        {"until": [], "do_sample": True, "max_gen_toks": 9, "seed": 1},
    ]
    given = [(text, kinds[number % 4]) for number, text in enumerate(TEXTS + TEXTS)]
    requests = _instances("generate_until", given)
    answers = model.generate_until(requests)
    assert model.generate_until(requests[::-1]) == answers[::-1]
    assert [model.generate_until([request])[0] for request in requests[:6]] == answers[:6]
    # A request that is repeated is drawn anew; one with another seed too.
    again = model.generate_until([requests[1]] * 3)
    assert again[0] == answers[1] and len(set(again)) == 3
    [other] = _instances("generate_until", [(TEXTS[1], kinds[1] | {"seed": 5})])
    other.doc_id = 1
    assert model.generate_until([other]) != answers[1:2]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (
            {"do_sample": True, "min_p": 0.9},
            r"\['min_p'\] are not supported: sample by temperature, top_k, top_p and seed",
        ),
        ({"max_gen_toks": ROW}, "max_gen_toks=32 leaves no room for a prompt in the 32 positions"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be positive"),
        ({"until": ["a", 3]}, "until=3 is no text"),
        ({"do_sample": True, "top_k": 301}, "top_k=301 must be null or lie in"),
        ({"do_sample": True, "top_p": 2}, r"top_p=2.0 must be null or lie in \(0, 1\]"),
        ({"do_sample": True, "seed": 2**40}, "generation_kwargs seed=1099511627776 must lie in"),
    ],
)
def test_settings_that_cannot_be_are_named_with_their_document(
    model: GrugLM, kwargs: dict[str, Any], words: str
) -> None:
    requests = _instances("generate_until", [("grug", {"until": []}), ("brain", kwargs)])
    with pytest.raises(ValueError, match=f"task 'task', document 1: .*{words}"):
        model.generate_until(requests)


def test_documents_begin_as_in_training(scorer: Scorer, tokenizer: HfMarinTokenizer) -> None:
    plain = GrugLM(scorer, tokenizer)
    assert plain.prefix_token_id == plain.eot_token_id == tokenizer.eos_token_id
    assert plain.tok_encode("grug") == tokenizer.encode("grug")
    with_bos = GrugLM(scorer, replace(tokenizer, _bos_id=7, _bos_token="x"))
    assert with_bos.prefix_token_id == 7
    assert with_bos.tok_encode("grug") == [7, *tokenizer.encode("grug")]
    assert with_bos.tok_encode("grug", add_special_tokens=False) == tokenizer.encode("grug")
    pair = _instances("loglikelihood", [("grug say", " brain")])
    [expected] = scorer.score([Request([7, *tokenizer.encode("grug say")], tokenizer.encode(" brain"))])
    assert with_bos.loglikelihood(pair) == TemplateLM.loglikelihood(with_bos, pair)
    wanted = expected.log_likelihood
    assert with_bos.loglikelihood(pair)[0][0] == pytest.approx(wanted, abs=tolerance(TERMS, wanted))
    with pytest.raises(ValueError, match="no EOS token"):
        GrugLM(scorer, replace(tokenizer, _eos_id=None))
