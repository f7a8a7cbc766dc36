from dataclasses import replace

import jax
import pytest

from experiments.benchmarks.hlo import read_program
from experiments.benchmarks.scale import ScaleReport, report
from grug_native import model as model_module
from grug_native.metrics import parameter_counts
from grug_native.sharding import reshard
from tests.fixtures_run import SMALL_MODEL, MakeRun

PLAIN = replace(SMALL_MODEL, attention="reference", remat="none")
SCANNED = replace(PLAIN, scan_layers=True, remat="full", num_layers=3)
COUNTS = parameter_counts(SCANNED)

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%wrapped (param: f32[8]) -> f32[2] {
  %param = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%param), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%body (state: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %state = (s32[], f32[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4,6]{1,0} get-tuple-element(%state), index=1
  %w = bf16[6,8]{1,0} all-gather(%shard), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jvp()"}
  %dot.1 = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %start = ((f32[8]{0}), f32[2]{0}) async-start(%flat), calls=%wrapped
  %done = f32[2]{0} async-done(%start), calls=%wrapped
  ROOT %next = (s32[], f32[4,6]{1,0}) tuple(%i, %x)
}

%condition (state.1: (s32[], f32[4,6])) -> pred[] {
  %state.1 = (s32[], f32[4,6]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[4,6]) -> f32[] {
  %p = f32[4,6]{1,0} parameter(0)
  %loop = (s32[], f32[4,6]{1,0}) while(%init), condition=%condition, body=%body
  %pair = (f32[3], /*index=1*/f32[]) all-reduce(%a, %b), replica_groups=mesh['x'=4,'y'=2] {'x'}, op_name="transpose()"
  %alone = f32[] all-reduce(%c), replica_groups={{0},{1}}
  %ag = (f32[2]{0}, f32[16]{0}) all-gather-start(%d), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %out = f32[] constant(0)
}
"""


def test_a_program_is_read_through_its_loops() -> None:
    program = read_program(PROGRAM)
    assert program.dot_flops == 5 * 2 * 4 * 8 * 6
    found = [(each.kind, str(each.result), each.group, each.times, each.backward) for each in program.collectives]
    assert found == [
        ("all-gather", "bf16[6,8]", 4, 5, False),
        ("reduce-scatter", "f32[2]", 4, 5, False),
        ("all-reduce", "f32[3]", 4, 1, True),
        ("all-reduce", "f32[]", 4, 1, True),
        ("all-gather", "f32[16]", 8, 1, False),
    ]
    gathered, scattered, summed, *_ = program.collectives
    assert (gathered.received, scattered.received, summed.received) == (5 * 96 * 3 / 4, 5 * 8 * 3, 2 * 12 * 3 / 4)


def test_a_loop_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="the loop loop does not say how often it runs"):
        read_program(PROGRAM.replace("constant(5)", "parameter(1)"))


def compile_and_read(make_run: MakeRun, **sections: object) -> ScaleReport:
    return report(make_run(**{"model": SCANNED, "trainer": {"cross_entropy": "blockwise"}} | sections), jax.devices())


def test_a_step_gathers_each_weight_once_a_pass_and_scatters_its_gradient(make_run: MakeRun) -> None:
    found = compile_and_read(make_run)
    blocks, ends = COUNTS["blocks.attn"] + COUNTS["blocks.mlp"], COUNTS["embed"] + COUNTS["lm_head"]
    assert found.ideal == 4 * 3 * (blocks + ends) * 3 / 4
    # The embedding and the head are not needed again in the backward pass.
    assert found.received["all-gather"] == 4 * (2 * blocks + ends) * 3 / 4
    assert found.received["reduce-scatter"] == 4 * (blocks + ends) * 3 / 4
    assert found.of_ideal < 1.0
    assert found.flops == pytest.approx(found.expected_flops)


def test_unrolled_layers_keep_what_they_gathered(make_run: MakeRun) -> None:
    found = compile_and_read(make_run, model=PLAIN)
    assert found.received["all-gather"] == pytest.approx(found.ideal / 3)
    assert found.flops == pytest.approx(found.model_flops)


def test_a_gradient_that_is_summed_whole_is_found(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "unshard", reshard)
    jax.clear_caches()  # The step may have been traced with the real one, and is not to be used with this one.
    try:
        with pytest.raises(ValueError, match=r"is summed whole on every device: .*transpose"):
            compile_and_read(make_run)
    finally:
        jax.clear_caches()
