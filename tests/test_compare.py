import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import compare, kernels
from experiments.benchmarks.peers import shapes
from experiments.benchmarks.peers.gate import Turn
from experiments.benchmarks.peers.inputs import random_segments
from experiments.benchmarks.peers.shapes import SHAPES, Job
from experiments.benchmarks.peers.summary import Comparison, Start
from experiments.benchmarks.peers.worker import CONTENDERS
from tests.fixtures_run import without_runtime_types

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "experiments/benchmarks/peers"

LOOP = """
from experiments.benchmarks.peers.gate import Gate
gate = Gate(lambda: print("noise"), lambda: None, {"platform": "cpu"})
for step in range(100):
    gate.step_done(step / 2, 0.5)
"""


def turn(*values: float, seconds: float, platform: str = "cpu") -> Turn:
    return Turn(
        seconds=seconds,
        steps=[seconds / len(values)] * len(values),
        values=list(values),
        calls=[0.001] * len(values),
        finished_at=0.0,
        peak_rss=2**30,
        peak_device=None,
        about={"platform": platform, "device": "NVIDIA H200"},
    )


def turns(*seconds: float, shift: float = 0.0, platform: str = "cpu") -> list[Turn]:
    first = [turn(9.0, seconds=50.0, platform=platform), turn(8.0, seconds=3.0, platform=platform)]
    return first + [turn(7.0 + shift, 6.0, seconds=value, platform=platform) for value in seconds]


def imported_modules(source: Path) -> set[str]:
    tree = ast.walk(ast.parse(source.read_text()))
    plain = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    tree = ast.walk(ast.parse(source.read_text()))
    return plain | {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module}


def test_a_held_loop_takes_the_steps_that_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", LOOP], cwd=ROOT, input="3\n1\n", capture_output=True, text=True)
    turns = [Turn(**json.loads(line)) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [turn.values for turn in turns] == [[0.0], [0.5, 1.0, 1.5], [2.0]]
    assert [len(turn.steps) for turn in turns] == [1, 3, 1]
    assert turns[1].calls == [0.5] * 3 and turns[1].peak_rss > 2**20
    assert done.stderr == "noise\n" * 4  # settled at the end of each turn, and after the first step of a longer one


def test_what_torchs_interpreter_runs_needs_torch_and_numpy_only() -> None:
    for name in ("shapes", "gate"):
        assert {module.split(".")[0] for module in imported_modules(PEERS / f"{name}.py")} <= sys.stdlib_module_names
    source = PEERS / "torch_llama.py"
    compile(source.read_text(), str(source), "exec")
    others = {name for name in imported_modules(source) if name.split(".")[0] not in sys.stdlib_module_names}
    assert others == {
        "numpy",
        "torch",
        "torch.nn.attention.flex_attention",
        "torch.nn.functional",
        "experiments.benchmarks.peers",
        "experiments.benchmarks.peers.gate",
        "experiments.benchmarks.peers.shapes",
    }


def test_the_bare_step_needs_nothing_of_levanter() -> None:
    names = ", ".join(f"experiments.benchmarks.peers.{name}" for name in ("ours_step", "inputs", "matmul"))
    code = f"import sys, {names}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"levanter", "haliax", "fray", "draccus", "datasets", "pyarrow"}.intersection(done.stdout.split())


def test_every_contender_has_its_module() -> None:
    modules = {contender.module for contender in CONTENDERS.values()}
    modules |= {contender.arguments[0] for contender in CONTENDERS.values() if contender.module == "program"}
    assert modules == {"program", "ours_fit", "ours_step", "levanter_train", "torch_llama"}
    assert all((PEERS / f"{module}.py").is_file() for module in modules)


def make_job(folder: Path, shape: str) -> Job:
    return Job(
        folder=str(folder),
        shape=shape,
        num_batches=3,
        data="random",
        corpora="corpora",
        cpu_devices=1,
        model={"remat": "full"},
        levanter_weights=False,
    )


@pytest.mark.parametrize("shape", ["toy", "host"])
def test_rows_of_any_length_hold_some_documents(shape: str, tmp_path: Path) -> None:
    sizes = SHAPES[shape]
    segments = random_segments(make_job(tmp_path, shape))
    assert segments.shape == (3, sizes.batch_size, sizes.seq_len)
    counts = segments[..., -1] + 1
    assert counts.min() >= 3 and counts.max() <= min(9, sizes.seq_len)


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = make_job(tmp_path, "toy")
    assert Job.read(str(job.write())) == job
    assert job.sizes == SHAPES["toy"] and job.sizes.tokens == 256


def test_ratios_are_those_of_neighbours_in_time() -> None:
    comparison = Comparison("toy", {}, {"full": 1e9, "causal": 5e8}, matmul=[1e11, 2e11])
    comparison.sessions.append({"levanter_train": turns(8.0), "ours_fit": turns(4.0)})
    comparison.sessions.append({"ours_fit": turns(1.0, 2.0), "torch_eager": turns(1.5, 3.0, shift=1e-3)})
    comparison.record("torch_eager").cold.append(Start(first_step_after=20.0, compile=5.0))
    levanter, ours, torch = comparison.rows()
    assert comparison.baseline == "ours_fit"
    assert ours["step [s]"] == "1.000 (0.500 to 2.000)"
    assert ours["tokens/s"] == "256 (128 to 512)"
    assert levanter["ours_fit is faster by"] == "2.000"
    assert torch["ours_fit is faster by"] == "1.500 (1.500 to 1.500)"
    assert (ours["MFU full"], ours["MFU causal"]) == ("128.0%", "64.0%")
    assert torch["loss after"] == "6.00000 (5 steps)"
    assert (torch["compile cold [s]"], torch["first step cold [s]"]) == ("5.0", "20.0")
    assert "compile cold [s]" not in ours and "torch_eager" in compare.markdown(comparison)


def test_a_device_whose_peak_is_known_is_measured_by_it() -> None:
    comparison = Comparison("toy", {}, {"full": 1e12, "causal": 5e11})
    comparison.sessions.append({"ours_step": turns(1.0, platform="gpu")})
    (row,) = comparison.rows()
    assert row["MFU full"] == f"{512 * 1e12 / 989.5e12:.1%}" and row["host [ms]"].startswith("1.00 ")


@pytest.mark.parametrize(
    ("name", "platform", "shift", "agrees"),
    [
        ("ours_step", "cpu", 7e-7, True),
        ("ours_step", "cpu", 7e-5, False),
        ("torch_eager", "cpu", 7e-5, True),
        ("torch_eager", "cpu", 2e-2, False),
        ("torch_compile", "cuda", 2e-2, True),
        ("torch_compile", "cuda", float("nan"), False),
    ],
)
def test_other_losses_are_an_error(name: str, platform: str, shift: float, agrees: bool) -> None:
    session = {"ours_fit": turns(1.0, platform=platform), name: turns(1.0, platform=platform, shift=shift)}
    disagreements = Comparison("toy", {}, sessions=[session]).disagreements()
    assert (disagreements == []) == agrees
    assert all(words.startswith(f"{name}: losses differ from those of ours_fit") for words in disagreements)


def test_no_contender_is_measured_that_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--contenders", "torch_eager", "--torch-python", sys.executable], "has no torch"),
        (["--contenders", "ours_fit", "--data", "random"], "--data random is for bare steps"),
        (["--contenders", "theirs"], "unknown contenders"),
        (["--contenders", "ours_step", "--phases", "stop"], "unknown phases"),
    ):
        with pytest.raises(SystemExit):
            compare.main(arguments)
        assert words in capsys.readouterr().err


def test_the_bare_step_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    asked = {
        "--shape": "toy",
        "--data": "random",
        "--contenders": "ours_step",
        "--phases": "rounds",
        "--rounds": "2",
        "--steps": "2",
        "--work-dir": str(tmp_path),
        "--json": str(file),
    }
    compare.main([word for pair in asked.items() for word in pair])
    assert "| ours_step |" in capsys.readouterr().out
    comparison = Comparison.from_json(json.loads(file.read_text()))
    (session,) = comparison.sessions
    assert [len(turn.values) for turn in session["ours_step"]] == [1, 1, 2, 2]
    assert abs(session["ours_step"][0].values[0] - 6.24) < 0.2  # log(512): nothing is learnt yet
    assert len(comparison.matmul) == 2 and min(comparison.matmul) > 0
    assert comparison.flops["full"] > comparison.flops["causal"] > 0
    assert {"date", "processor", "jax"} <= comparison.environment.keys()


def test_each_kernel_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    for only, names in (("attention reference", ["attention reference"]), ("entropy b", ["cross-entropy blockwise"])):
        with without_runtime_types():  # `Head` is no Transformer
            kernels.main(["--shape", "toy", "--rounds", "1", "--only", only])
        rows = capsys.readouterr().out.splitlines()[4:]
        assert [row.split(" |")[0] for row in rows] == [
            f"| {name}, {way}" for name in names for way in ("forward", "both")
        ]


def test_all_contenders_have_the_same_numbers() -> None:
    from experiments.benchmarks.peers import ours

    config = ours.optimizer_config()
    assert (config.beta1, config.beta2) == shapes.BETAS and config.max_grad_norm == shapes.MAX_GRAD_NORM
    assert float(ours.optimizer().learning_rate(0)) == pytest.approx(shapes.LEARNING_RATE)
    assert float(ours.optimizer().learning_rate(1000)) == pytest.approx(shapes.LEARNING_RATE)
