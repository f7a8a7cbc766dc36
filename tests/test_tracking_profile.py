import gzip
import json
import logging
from pathlib import Path

import jax
import pytest
from jax.profiler import ProfileData

from grug_native.runner import GrugRunner
from grug_native.tracking.jsonl import METRICS_FILE, read_metrics
from grug_native.tracking.profile import Kernel, StepProfile, kernel_table, profile_window, read_trace
from tests.fixtures_run import MakeRun


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("20", ["trainer.profile='20'", "START:STEPS", "20:5"]),
        ("a:b", ["trainer.profile='a:b'", "START:STEPS"]),
        ("-1:5", ["trainer.profile='-1:5'", "START must not be negative"]),
        ("5:0", ["trainer.profile='5:0'", "STEPS must be positive"]),
        ("8:1", ["trainer.profile='8:1'", "trainer.num_train_steps=8", "begin earlier"]),
        ("6:3", ["ends after step 9"]),
    ],
)
def test_what_cannot_be_profiled_is_refused(make_run: MakeRun, asked: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make_run(trainer={"profile": asked})
    assert all(word in str(error.value) for word in words)


def test_a_window_is_a_range_of_steps() -> None:
    assert profile_window("6:2", 8) == range(6, 8)
    assert not profile_window(None, 8)


def _fit(make_run: MakeRun, name: str, profile: str | None, *, stop_after: int = 6) -> tuple[Path, int]:
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    config = make_run(name=name, trainer={"profile": profile})
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        GrugRunner(config).fit(stop_after=stop_after)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return Path(config.output_path), len(compiled)


def _rows(run: Path) -> list[list[object]]:
    keys = ("train/loss", "grad/norm/total", "data/batch_digest")
    return [[row[key] for key in keys] for row in read_metrics(run / METRICS_FILE)]


def test_a_profile_is_a_trace_and_a_table_and_changes_nothing(make_run: MakeRun) -> None:
    _fit(make_run, "first", None)
    plain, compiled = _fit(make_run, "plain", None)
    traced, compiled_too = _fit(make_run, "traced", "3:2")
    assert compiled_too == compiled  # the same step, and nothing else
    assert _rows(traced) == _rows(plain)
    assert not (plain / "profile").exists()
    folder = traced / "profile" / "step-3"

    [written] = folder.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(written.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "train"]
    assert sorted(int(event["args"]["step_num"]) for event in steps) == [3, 4]
    for part in ("data", "step", "log"):
        inside = [event for event in events if event.get("name") == part]
        assert len(inside) == 2
        assert all(any(s["ts"] <= e["ts"] and e["ts"] + e["dur"] <= s["ts"] + s["dur"] for s in steps) for e in inside)

    trace = read_trace(folder)
    assert min(trace.parts.values()) > 0
    assert any("dot" in kernel.name or "fusion" in kernel.name for kernel in trace.kernels)
    assert [k.seconds for k in trace.kernels] == sorted((k.seconds for k in trace.kernels), reverse=True)
    table = (folder / "profile.txt").read_text()
    assert table == f"steps 3 to 4\n{kernel_table(trace, 2)}"
    assert trace.kernels[0].name in table and len(table.splitlines()) == 4 + min(20, len(trace.kernels))


def test_a_resumed_run_may_be_profiled(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    _fit(make_run, "run", None, stop_after=3)
    run, _ = _fit(make_run, "run", "1:7", stop_after=5)
    assert (run / "profile" / "step-3" / "profile.txt").read_text().startswith("steps 3 to 4\n")
    with caplog.at_level(logging.WARNING):
        _fit(make_run, "run", "1:3", stop_after=6)
    assert "trainer.profile=1:3 lies before step 5" in caplog.text
    assert [path.name for path in (run / "profile").iterdir()] == ["step-3"]


def test_who_does_not_ask_makes_no_annotations(tmp_path: Path) -> None:
    profile = StepProfile(range(0), tmp_path, start_step=0)
    assert not profile.turns_at(0)
    assert profile.part("data") is profile.part("step")
    profile.begin(0)
    profile.close()
    assert list(tmp_path.iterdir()) == []


# What a trace of a GPU holds: streams with kernels, lines that sum them up, and the host's threads.
GPU_TRACE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000 }
    events { metadata_id: 2 offset_ps: 4000000 duration_ps: 1000000 }
    events { metadata_id: 3 offset_ps: 6000000 duration_ps: 2000000 }
  }
  lines { name: "XLA Modules" events { metadata_id: 4 offset_ps: 0 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "sm90_gemm_128x256" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion_12" } }
  event_metadata { key: 3 value { id: 3 name: "loop_add_fusion" } }
  event_metadata { key: 4 value { id: 4 name: "jit_train_step" } }
}
planes {
  name: "/device:TPU:0"
  lines { name: "XLA Ops"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 }
    events { metadata_id: 2 offset_ps: 1000000 duration_ps: 7000000 }
  }
  lines { name: "Steps" events { metadata_id: 3 offset_ps: 0 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "while.3" } }
  event_metadata { key: 2 value { id: 2 name: "convolution.7" } }
  event_metadata { key: 3 value { id: 3 name: "0" } }
}
planes {
  name: "/host:CPU"
  lines { name: "python" events { metadata_id: 1 offset_ps: 0 duration_ps: 5000000 } }
  event_metadata { key: 1 value { id: 1 name: "log" } }
}
"""


def test_kernels_are_counted_once_on_every_kind_of_device(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no trace"):
        read_trace(tmp_path)
    path = tmp_path / "plugins" / "profile" / "now" / "host.xplane.pb"
    path.parent.mkdir(parents=True)
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(GPU_TRACE))
    trace = read_trace(tmp_path)
    found = {kernel.name: (kernel.calls, round(1e6 * kernel.seconds, 6)) for kernel in trace.kernels}
    assert found == {"convolution": (1, 7), "sm90_gemm_128x256": (1, 3), "loop_add_fusion": (2, 3), "while": (1, 2)}
    assert trace.parts == {"data": 0, "step": 0, "log": pytest.approx(5e-6)}
    assert "     0.007   46.7%      1.0  convolution\n" in kernel_table(trace, 1)
    assert (
        kernel_table(trace._replace(kernels=(Kernel("a", 4, 1.0),) * 30), 2).count("500.000    3.3%      2.0  a\n")
        == 20
    )
