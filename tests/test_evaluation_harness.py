import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import draccus
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from jaxtyping import Array
from levanter.data.dataset import ListAsyncDataset
from levanter.data.text.examples import GrugLmExample
from levanter.grug.attention import AttentionMask
from levanter.tokenizers import MarinTokenizer
from lm_eval.tasks._index import TaskIndex
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from grug_native.attention import Mask
from grug_native.data.corpus import local_text_data
from grug_native.data.text_tokens import text_only
from grug_native.evaluation.config import GrugEvalConfig, GrugHarnessConfig
from grug_native.evaluation.harness import build_harness
from grug_native.evaluation.perplexity import build_tagged_evaluator
from grug_native.evaluation.scoring import Scorer
from grug_native.language_model import logits
from grug_native.model import GrugModelConfig, Transformer
from grug_native.optimizer import AdamWConfig, GrugOptimizer
from grug_native.schedule import ScheduleConfig
from grug_native.sharding import create_mesh
from grug_native.state import init_train_state
from grug_native.train import train_step
from tests.fixtures_data import make_text
from tests.fixtures_run import SMALL_MODEL, llama, without_runtime_types
from tests.tolerance import loss_terms, tolerance

if TYPE_CHECKING:
    pass

type MakeTask = Callable[..., dict[str, Any]]

DOCUMENTS = [
    {"good": f"grug say {make_text(seed, 8)}", "bad": f"say grug {make_text(seed, 8)}", "text": make_text(seed, 40)}
    for seed in range(12)
]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    mesh = create_mesh(4)
    with jax.set_mesh(mesh):
        params = Transformer.init(replace(SMALL_MODEL, initializer_std=0.3, max_seq_len=64), key=jax.random.key(0))
    return Scorer(params, mesh, 64, 4)


@pytest.fixture(scope="module")
def make_task(tmp_path_factory: pytest.TempPathFactory) -> MakeTask:
    """Makes a task over a local file, with lm-eval's copy of it in a folder of the test."""
    folder = tmp_path_factory.mktemp("tasks")

    def make(
        name: str, kind: str, documents: list[dict[str, Any]] = DOCUMENTS, form: str = "jsonl", **settings: Any
    ) -> dict[str, Any]:
        file = folder / f"{name}.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(documents), file)
        else:
            lines = [json.dumps(document) for document in documents]
            file.write_text("\n".join(lines) if form == "jsonl" else f"[{','.join(lines)}]")
        own = {
            "multiple_choice": {
                "doc_to_text": "",
                "doc_to_target": 0,
                "doc_to_choice": "{{[good, bad]}}",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            },
            "loglikelihood_rolling": {
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [
                    {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
                    for metric, aggregation in (
                        ("bits_per_byte", "bits_per_byte"),
                        ("word_perplexity", "weighted_perplexity"),
                    )
                ],
            },
            "generate_until": {
                "doc_to_text": "{{bad}}",
                "doc_to_target": "{{good}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            },
        }[kind]
        return {
            "task": name,
            "dataset_path": "parquet" if form == "parquet" else "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": kind,
            **own,
            **settings,
        }

    return make


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that has lm-eval read its own tasks."""
    build = TaskIndex.build

    def watched(paths: Any, **settings: Any) -> Any:
        assert not [path for path in paths if "lm_eval" in str(path)]
        return build(paths, **settings)

    monkeypatch.setattr(TaskIndex, "build", staticmethod(watched))


@pytest.mark.usefixtures("no_index")
def test_local_tasks_of_each_kind_and_spelling(
    scorer: Scorer, tokenizer: MarinTokenizer, make_task: MakeTask, tmp_path: Path
) -> None:
    pairs = make_task("pairs", "multiple_choice", form="parquet")
    by_name = make_task("rolling", "loglikelihood_rolling")
    by_path = make_task("generated", "generate_until", form="json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rolling.yaml").write_text(yaml.safe_dump(by_name))
    (tmp_path / "generated.yaml").write_text(yaml.safe_dump(by_path))
    config = GrugHarnessConfig(
        tasks=(pairs, "rolling", str(tmp_path / "generated.yaml")), include_path=str(tmp_path / "mine")
    )
    given = json.dumps(pairs)
    harness = build_harness(config, tokenizer, max_length=64)
    metrics = harness.run(scorer, step=7, folder=tmp_path / "harness")
    assert json.dumps(pairs) == given
    assert metrics.keys() == {
        "lm_eval/pairs/acc",
        "lm_eval/pairs/acc_stderr",
        "lm_eval/rolling/bits_per_byte",
        "lm_eval/rolling/word_perplexity",
        "lm_eval/generated/exact_match",
        "lm_eval/generated/exact_match_stderr",
    }
    report = json.loads((tmp_path / "harness" / "step-7-pairs+rolling+generated.json").read_text())
    assert report["results"]["pairs"]["acc,none"] == metrics["lm_eval/pairs/acc"]
    assert report["n-samples"]["rolling"]["effective"] == len(DOCUMENTS)
    assert report["run"]["step"] == 7
    assert report["run"]["tokens"] > len(DOCUMENTS)
    assert "samples" not in report
    assert [file.name for file in (tmp_path / "harness").iterdir()] == ["step-7-pairs+rolling+generated.json"]
    assert harness.run(scorer, step=8) == metrics


def _surroundings() -> tuple[object, ...]:
    """What lm-eval might leave changed: random states and the environment."""
    return random.getstate(), str(np.random.get_state()), dict(os.environ)  # noqa: NPY002 - what lm-eval seeds


@pytest.mark.usefixtures("no_index")
def test_examples_limits_and_random_states(
    scorer: Scorer, tokenizer: MarinTokenizer, make_task: MakeTask, tmp_path: Path
) -> None:
    task = make_task("shots", "generate_until", fewshot_split="test", num_fewshot=1)
    fixed = make_task("fixed", "generate_until", fewshot_split="test", num_fewshot=0)
    config = GrugHarnessConfig(tasks=(task, fixed), limit=5, num_fewshot=2, log_samples=True)
    random.seed(3)
    before = _surroundings()
    with without_runtime_types():  # beartype draws the items of a list that it looks at.
        harness = build_harness(config, tokenizer, max_length=64)
        harness.run(scorer, step=0, folder=tmp_path)
    assert before == _surroundings()
    random.seed(4)
    harness.run(scorer, step=1, folder=tmp_path)
    reports = [json.loads((tmp_path / f"step-{step}-shots+fixed.json").read_text()) for step in (0, 1)]
    assert reports[0]["n-shot"] == {"shots": 2, "fixed": 0}
    samples = [report["samples"]["shots"] for report in reports]
    assert [len(own) for own in samples] == [5, 5]
    prompts = [[sample["arguments"][0][0] for sample in own] for own in samples]
    assert prompts[0] == prompts[1]
    assert all(prompt.count("\n\n") >= 2 for prompt in prompts[0])


def test_tasks_that_execute_code_are_refused(tokenizer: MarinTokenizer, make_task: MakeTask, tmp_path: Path) -> None:
    unsafe = make_task("unsafe", "generate_until", unsafe_code=True, dataset_path="nothing/to-be-fetched")
    (tmp_path / "unsafe.yaml").write_text(yaml.safe_dump(unsafe))
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "group", "task": ["unsafe"]}))
    (tmp_path / "tagged.yaml").write_text(yaml.safe_dump(unsafe | {"task": "tagged", "tag": "label"}))
    inline = {"group": "mine", "task": [{"task": "unsafe", "num_fewshot": 0}]}
    for spec in (unsafe, str(tmp_path / "unsafe.yaml"), "group", "label", inline):
        with pytest.raises(ValueError, match="executes code"):
            build_harness(GrugHarnessConfig(tasks=(spec,), include_path=str(tmp_path)), tokenizer, max_length=64)


def test_tasks_that_are_not_there_are_named(
    tokenizer: MarinTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no file 'nowhere\.yaml'"):
        build_harness(GrugHarnessConfig(tasks=("nowhere.yaml",)), tokenizer, max_length=64)
    # A folder of one task stands for lm-eval's own, which take half a minute to read.
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump({"task": "sums", "dataset_path": "json"}))
    build = TaskIndex.build
    monkeypatch.setattr(TaskIndex, "build", staticmethod(lambda paths: build([tmp_path] if paths else [])))
    with pytest.raises(ValueError, match=r"no task 'sum'; near it are \['sums'\]"):
        build_harness(GrugHarnessConfig(tasks=("sum",)), tokenizer, max_length=64)


@pytest.mark.usefixtures("no_index")
def test_what_does_not_fit_is_refused_when_it_is_loaded(tokenizer: MarinTokenizer, make_task: MakeTask) -> None:
    long = [*DOCUMENTS[:2], {"good": "grug", "bad": make_text(0, 400), "text": ""}]
    blank: dict[str, Any] = {"doc_to_text": " \n", "doc_to_choice": ["grug", "brain"]}
    room: dict[str, Any] = {"generation_kwargs": {"until": [], "max_gen_toks": 64}}
    shots: dict[str, Any] = {"fewshot_split": "test", "num_fewshot": 12}
    for task, words in (
        (make_task("long", "multiple_choice", long), r"task 'long', document 2: choice 1 has \d+ tokens, and .* 64 at"),
        (make_task("blank", "multiple_choice", **blank), "task 'blank', document 0: its context is white space only"),
        (make_task("room", "generate_until", **room), "task 'room', document 0: .*max_gen_toks=64 leaves no room"),
        (make_task("shots", "generate_until", **shots), "'shots' wants 12 examples .*, and there are 11 to take"),
    ):
        with pytest.raises(ValueError, match=words):
            build_harness(GrugHarnessConfig(tasks=(task,)), tokenizer, max_length=64)
    # What is not asked for is not looked at.
    build_harness(
        GrugHarnessConfig(tasks=(make_task("l", "multiple_choice", long),), limit=2), tokenizer, max_length=64
    )


@pytest.mark.usefixtures("no_index")
def test_the_report_counts_contexts_that_were_cut(
    scorer: Scorer, tokenizer: MarinTokenizer, make_task: MakeTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = [{"text": text, "good": "grug", "bad": "brain"} for text in ("say", make_text(0, 400), "very bad")]
    context: dict[str, Any] = {"doc_to_text": "{{text}}"}
    tasks = (
        make_task("choices", "multiple_choice", documents, **context),
        make_task("words", "generate_until", documents, **context),
        make_task("pages", "loglikelihood_rolling", documents),
    )
    harness = build_harness(GrugHarnessConfig(tasks=tasks), tokenizer, max_length=64)
    harness.run(scorer, step=3, folder=tmp_path)
    counted = json.loads((tmp_path / "step-3-choices+words+pages.json").read_text())["run"]["cut_contexts"]
    assert counted == {"choices": {"contexts": 6, "cut": 2}, "words": {"contexts": 3, "cut": 1}}
    assert "task 'choices': 2 of 6 contexts do not fit into 64 tokens" in caplog.text


def test_the_config_survives_its_yaml_and_knows_when() -> None:
    inline = {"task": "x", "metric_list": [{"metric": "acc"}], "num_fewshot": None}
    config = GrugEvalConfig(harness=GrugHarnessConfig(tasks=("a", inline, "b.yaml"), steps_per_harness=4))
    assert draccus.decode(GrugEvalConfig, json.loads(json.dumps(draccus.encode(config)))) == config
    assert config.harness is not None
    assert [step for step in range(11) if config.harness.is_due(step, 10)] == [0, 4, 8, 10]
    assert not GrugHarnessConfig(tasks=("a",)).is_due(0, 10)
    mistakes: list[dict[str, Any]] = [
        {"tasks": ()},
        {"limit": 0},
        {"batch_size": 0},
        {"steps_per_harness": 0},
        {"num_fewshot": -1},
    ]
    one: dict[str, Any] = {"tasks": ("a",)}
    for wrong in mistakes:
        with pytest.raises(ValueError, match=rf"eval\.harness\.{next(iter(wrong))}"):
            GrugHarnessConfig(**(one | wrong))


NOUNS = ["dog", "cat", "caveman", "shaman", "hunter", "rock"]
VERBS = ["eat", "sleep", "run", "hide", "sing", "jump"]
ADJECTIVES = ["old", "small", "happy", "wet"]


def _sentence(rng: random.Random, *, plural: bool, agrees: bool) -> str:
    noun, verb = rng.choice(NOUNS), rng.choice(VERBS)
    return f"the {rng.choice(ADJECTIVES)} {noun}{'s' if plural else ''} {verb}{'s' if plural != agrees else ''} now."


@dataclass(frozen=True)
class Prose:
    """A model of sentences in which noun and verb agree, before and after its training, and its tokenizer."""

    tokenizer: MarinTokenizer
    untrained: Scorer
    trained: Scorer


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Prose:
    folder, rng = tmp_path_factory.mktemp("prose"), random.Random(0)
    lines = [_sentence(rng, plural=rng.random() < 0.5, agrees=True) for _ in range(3000)]
    (folder / "prose.txt").write_text("\n".join(lines))
    data = local_text_data({"prose": folder / "prose.txt"}, cache_dir=folder / "corpora", vocab_size=300)
    tokenizer = data.the_tokenizer
    config = GrugModelConfig(
        vocab_size=300, hidden_dim=32, intermediate_dim=64, num_layers=2, num_heads=2, num_kv_heads=2, max_seq_len=32
    )
    optimizer = GrugOptimizer(AdamWConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup=10)), 150)
    mesh = create_mesh(32, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_train_state(config, optimizer, key=jax.random.key(0))
        untrained = Scorer(jax.tree.map(jnp.copy, state.params), mesh, 32, 32)
        for step in range(150):
            state, _ = train_step(optimizer, state, _batch(tokenizer, lines, step))
    return Prose(tokenizer, untrained, Scorer(state.params, mesh, 32, 32))


@pytest.mark.usefixtures("no_index")
def test_a_model_trained_on_prose_tells_good_from_bad(prose: Prose, make_task: MakeTask) -> None:
    rng = random.Random(1)
    pairs: list[dict[str, Any]] = []
    for plural in (False, True) * 60:  # As many where the good one is the longer as where it is the shorter.
        state = rng.getstate()
        good = _sentence(rng, plural=plural, agrees=True)
        rng.setstate(state)
        pairs.append({"good": good, "bad": _sentence(rng, plural=plural, agrees=False)})
    task = make_task("agreement", "multiple_choice", pairs)
    harness = build_harness(GrugHarnessConfig(tasks=(task,)), prose.tokenizer, max_length=32)
    assert 0.4 <= harness.run(prose.untrained, step=0)["lm_eval/agreement/acc"] <= 0.6
    assert harness.run(prose.trained, step=150)["lm_eval/agreement/acc"] > 0.9


@jax.jit
def _likeliest(params: Transformer, tokens: Array) -> Array:
    return jnp.argmax(logits(params, tokens, Mask()), axis=-1)


@pytest.mark.usefixtures("no_index")
def test_answers_are_those_of_full_forward_passes(prose: Prose, make_task: MakeTask, tmp_path: Path) -> None:
    """And so is an exact match of 200 documents, whose answers end at a stop string across tokens."""
    rng, tokenizer, stop = random.Random(2), prose.tokenizer, "s no"
    documents: list[dict[str, Any]] = []
    for number in range(200):
        # Every fifth prompt is too long, and loses its beginning.
        before = _sentence(rng, plural=False, agrees=True).rsplit(" ", 2)[0]
        long = "the old and the wet and the small and the old and the happy and " if number % 5 == 0 else ""
        documents.append({"text": long + before, "good": f" {rng.choice(VERBS)}"})
    task = make_task("verbs", "generate_until", documents, doc_to_text="{{text}}", doc_to_target="{{good}}")
    task["generation_kwargs"] = {"until": ["never", stop], "max_gen_toks": 8}
    harness = build_harness(GrugHarnessConfig(tasks=(task,), log_samples=True), tokenizer, max_length=32)
    found = harness.run(prose.trained, step=150, folder=tmp_path)["lm_eval/verbs/exact_match"]

    prompts = [tokenizer.encode(document["text"]) for document in documents]
    rows = [prompt[-(32 - 8) :] for prompt in prompts]
    for _ in range(8):
        padded = jnp.asarray([row + [0] * (32 - len(row)) for row in rows])
        with jax.set_mesh(prose.trained.mesh):
            table = np.asarray(_likeliest(llama(prose.trained.params), padded))
        rows = [[*row, int(table[number, len(row) - 1])] for number, row in enumerate(rows)]
    eos = str(tokenizer.eos_token)
    texts = [tokenizer.decode(row[-8:]) for row in rows]
    answers = [text.split(stop)[0].split(eos)[0] for text in texts]
    matches = [answer == document["good"] for answer, document in zip(answers, documents, strict=True)]
    report = json.loads((tmp_path / "step-150-verbs.json").read_text())
    samples = sorted(report["samples"]["verbs"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == answers
    assert found == np.mean(matches)
    assert 0 < found < 1
    cut = sum(len(prompt) > 32 - 8 for prompt in prompts)
    assert report["run"]["cut_contexts"]["verbs"] == {"contexts": 200, "cut": cut}
    assert cut == 40
    # The stop string begins in the middle of a token in some texts, and ends in the middle of one in others.
    inside: Counter[str] = Counter()
    for row, text in zip(rows, texts, strict=True):
        borders = {len(tokenizer.decode(row[-8 : end - 8 or None])) for end in range(1, 9)}
        if (at := text.find(stop)) >= 0:
            inside["starts"] += at not in borders
            inside["ends"] += at + len(stop) not in borders
    assert inside["starts"] > 0 and inside["ends"] > 0


def test_lm_evals_own_bits_per_byte_are_ours(scorer: Scorer, tokenizer: MarinTokenizer, make_task: MakeTask) -> None:
    texts = ["ö", "日本 🐕", "in tokenizers <|endoftext|> is special ", *(make_text(seed, 8) for seed in range(5))]
    texts += [make_text(seed, 8 * seed) for seed in range(6, 20)]
    text, eos = text_only(tokenizer), tokenizer.eos_token_id
    lengths = [len(text.encode(own)) for own in texts]
    assert eos is not None and min(lengths) < 10 and max(lengths) > 300
    task = make_task("pages", "loglikelihood_rolling", [{"text": own} for own in texts])
    # As lm-eval's windows, but for the room for EOS in a row of 64.
    shorter = replace(scorer, row_length=62)
    theirs = build_harness(GrugHarnessConfig(tasks=(task,)), tokenizer, max_length=62).run(shorter, step=0)
    examples: list[GrugLmExample] = []
    for own in texts:
        # lm-eval's own windows: all tokens of the text, each once, and here the end of the document after the last.
        windows = [make_disjoint_window(w) for w in get_rolling_token_windows(text.encode(own), eos, 62, 1)]
        for number, (context, scored) in enumerate(windows):
            scored = [*scored, eos] if number == len(windows) - 1 else scored
            ids = [*context, *scored]
            tokens = np.array(ids + [0] * (64 - len(ids)), np.int32)
            at = np.arange(64)
            weight = ((at >= len(context) - 1) & (at < len(ids) - 1)).astype(np.float32)
            # One segment: here the first EOS is the context of the text, as in lm-eval.
            examples.append(GrugLmExample(jnp.asarray(tokens), jnp.asarray(weight), AttentionMask.causal()))
    ours = build_tagged_evaluator(
        [(ListAsyncDataset(examples), ["pages"])],
        batch_size=4,
        mesh=scorer.mesh,
        vocab_size=scorer.params.config.vocab_size,
        tokenizer=tokenizer,
    ).evaluate(scorer.params)
    exact = theirs["lm_eval/pages/bits_per_byte"]
    terms = loss_terms(scorer.params.config, 64, 64)
    assert ours["eval/bpb_exact"] == pytest.approx(exact, abs=tolerance(terms, exact))


def _batch(tokenizer: MarinTokenizer, lines: list[str], step: int) -> GrugLmExample:
    """32 sentences, each after EOS in a row of its own."""
    assert tokenizer.eos_token_id is not None
    tokens, weight = np.zeros((32, 32), np.int32), np.zeros((32, 32), np.float32)
    for row in range(32):
        ids = [tokenizer.eos_token_id, *tokenizer.encode(lines[(32 * step + row) % len(lines)])]
        tokens[row, : len(ids)], weight[row, : len(ids) - 1] = ids, 1.0
    return GrugLmExample(jnp.asarray(tokens), jnp.asarray(weight), AttentionMask.causal())
