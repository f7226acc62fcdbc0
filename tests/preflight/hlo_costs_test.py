"""Counts of small programs written by hand, as libtpu prints them."""

import pathlib

import pytest

import personmae_jax
from personmae_jax.errors import RunError
from personmae_jax.preflight import hlo_costs, hlo_text
from personmae_jax.preflight.chips import CHIPS
from personmae_jax.preflight.hlo_costs import Cost

PACKAGE = pathlib.Path(personmae_jax.__file__).parent
V5E = CHIPS["v5e"]  # 1.5 GHz, 197 TFLOP/s, 819 GB/s

FRAMES = f"""
FileNames
1 "/elsewhere/train.py"
2 "{PACKAGE}/models/layers.py"
3 "{PACKAGE.parent}/.venv/flax/linear.py"

FunctionNames
1 "<module>"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=7 end_line=7 column=2 end_column=5}}
2 {{file_name_id=2 function_name_id=1 line=31 end_line=33 column=2 end_column=5}}
3 {{file_name_id=3 function_name_id=1 line=99 end_line=99 column=2 end_column=5}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}
4 {{file_location_id=2 parent_frame_id=4}}
5 {{file_location_id=2 parent_frame_id=2}}
"""
FUSED = """%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"9"}
}"""


def estimated(number: int, frame: int = 3, name: str = "jit(step)/dot") -> str:
    return (
        f'metadata={{op_name="{name}" stack_frame_id={frame}}}, '
        f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'
    )


def program(entry: str, *computations: str) -> str:
    inner = "\n\n".join(computations)
    return (
        f"HloModule jit_step, is_scheduled=true\n{FRAMES}\n{inner}\n\n"
        "ENTRY %main.1 (x: f32[8]) -> f32[8] {\n"
        f"  %x = f32[8]{{0:T(128)S(1)}} parameter(0)\n{entry}\n}}\n"
    )


def count(*texts: str) -> hlo_costs.Costs:
    return hlo_costs.count(program(*texts), V5E)


def loop(
    condition: str = "compare(%i, %limit), direction=LT",
    stride: str = "%one",
    step: str = "add",
    known: str = "",
) -> tuple[str, str, str]:
    """The entry, condition and body of `for i in range(2, 7)`, by default."""
    return (
        f"""  %two = s32[] constant(2)
  %copied = s32[]{{:T(128)}} copy(%two), {estimated(0)}
  %one = s32[] constant(1)
  %init = (s32[], f32[8], s32[]) tuple(%copied, %x, %one)
  %while = (s32[], f32[8], s32[]) while(%init), condition=%cond, body=%body{known}
  ROOT %out = f32[8] get-tuple-element(%while), index=1""",
        f"""%cond (p: (s32[], f32[8], s32[])) -> pred[] {{
  %p = (s32[], f32[8], s32[]) parameter(0)
  %limit = s32[]{{:T(128)}} constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[]{{:T(512)}} {condition}
}}""",
        f"""%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %p = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %one = s32[] get-tuple-element(%p), index=2
  %three = s32[] constant(3)
  %next = s32[] {step}(%i, {stride}), {estimated(0)}
  %made = f32[8] fusion(%x), kind=kLoop, calls=%fused, {estimated(100)}
  %sum = f32[8] all-reduce(%made), channel_id=1, to_apply=%add
  ROOT %results = (s32[], f32[8], s32[]) tuple(%next, %sum, %one)
}}""",
    )


def test_bytes_of_shapes_leave_layouts_out():
    assert hlo_text.num_bytes("f32[768,2304]{1,0:T(8,128)S(1)}") == 768 * 2304 * 4
    assert hlo_text.num_bytes("(bf16[3,5]{1,0:T(8,128)(2,1)}, u8[7], pred[2])") == 39
    assert hlo_text.num_bytes("s4[3]") == 2
    assert hlo_text.num_bytes("f32[]") == 4
    assert hlo_text.num_bytes("(token[], f8e4m3fn[6])") == 6


def test_the_compilers_cycles_of_the_entry_are_summed_and_nothing_inside_fusions():
    costs = count(
        "  %a = (f32[8]{0:T(128)(2,1)}, /*index=1*/f32[8]) fusion(%x), kind=kLoop, "
        f"calls=%fused, {estimated(1000)}\n"
        f"  ROOT %b = f32[8] negate(%x), {estimated(234)}",
        FUSED,
    )
    assert costs.compiler_cycles == costs.cycles == 1234
    assert not costs.kernels
    assert costs.others == Cost()


def test_cycles_go_to_the_innermost_line_of_the_package_and_its_caller():
    backward = "jit(step)/transpose(jvp(Encoder))/dot"
    costs = count(
        f"""  %a = f32[8] negate(%x), {estimated(1)}
  %b = f32[8] negate(%x), {estimated(20, frame=5)}
  %c = f32[8] negate(%x), {estimated(300, name=backward)}
  %d = f32[8] negate(%x), {estimated(4000, frame=1)}
  %e = f32[8] negate(%x), {estimated(600000, frame=4)}
  ROOT %f = f32[8] negate(%x), backend_config={{"estimated_cycles":"50000"}}"""
    )
    assert dict(costs.lines) == {
        "models/layers.py:31": Cost(count=2, cycles=21.0),
        "models/layers.py:31 (backward)": Cost(count=1, cycles=300.0),
        "/elsewhere/train.py:7": Cost(count=1, cycles=4000.0),
        "no source line": Cost(count=1, cycles=50000.0),
        "models/layers.py:31 < models/layers.py:31": Cost(count=1, cycles=600000.0),
    }


def kernel(flops: int, num_bytes: int) -> str:
    estimate = f'{{"flops":"{flops}","transcendentals":"5","bytes_accessed":"0"}}'
    size = num_bytes // 8  # read and written, 4 bytes each
    return f"""  %y = f32[{size}] parameter(1)
  ROOT %attention.3 = f32[{size}] custom-call(%y),
    custom_call_target="tpu_custom_call", metadata={{op_name="k" stack_frame_id=2}},
    backend_config={{"custom_call_config":{{"body":"TUz=","cost_estimate":{estimate}}}}}
""".replace(",\n    ", ", ")


def test_a_kernel_bound_by_computing_counts_its_flops_at_six_tenths_of_the_peak():
    flops = 197 * 6 * 10**9
    costs = count(kernel(flops, 8000))
    name = "attention models/layers.py:31"
    assert costs.kernels.keys() == {name}
    cost = costs.kernels[name]
    assert (cost.count, cost.flops, cost.bytes) == (1, flops, 8000)
    assert costs.cycles == cost.cycles == pytest.approx(1.5e9 * 0.01)
    assert costs.compiler_cycles == 0
    assert costs.lines["models/layers.py:31"].cycles == cost.cycles


def test_a_kernel_bound_by_memory_counts_all_that_it_reads_and_writes():
    costs = count(kernel(1000, 819 * 8 * 10**6))
    assert costs.cycles == pytest.approx(1.5e9 * 0.008)


def test_a_kernel_may_state_more_bytes_than_its_arrays_have():
    text = kernel(1000, 8000).replace('"bytes_accessed":"0"', '"bytes_accessed":"9000"')
    assert count(text).kernels["attention models/layers.py:31"].bytes == 9000


def test_a_kernel_that_tells_no_flops_is_refused():
    text = kernel(1000, 8000).replace("cost_estimate", "other")
    with pytest.raises(RunError, match=r"attention\.3.*layers\.py:31 tells no FLOPs"):
        count(text)


def test_names_of_places_cost_nothing():
    costs = count(
        '  %a = f32[99] custom-call(), custom_call_target="AllocateBuffer"\n'
        '  ROOT %b = f32[99] custom-call(%a), custom_call_target="ConcatBitcast"'
    )
    assert costs.cycles == 0


def test_what_has_no_estimate_counts_by_its_bytes():
    costs = count("  ROOT %a = f32[8,1024]{1,0} reshape(%x)")
    assert costs.others.bytes == 4 * 8 * 1025
    assert costs.cycles == pytest.approx(4 * 8 * 1025 * 1.5e9 / 819e9)


def test_a_matrix_product_without_an_estimate_is_refused():
    dot = FUSED.replace("copy(%p)", "convolution(%p, %p)")
    with pytest.raises(RunError, match="multiplies matrices"):
        count("  ROOT %a = f32[8] fusion(%x), kind=kOutput, calls=%fused", dot)


def test_a_loop_counts_its_body_as_often_as_it_runs():
    costs = count(*loop(), FUSED)
    assert costs.cycles == 500
    assert costs.collectives["all-reduce"] == Cost(count=5, bytes=5 * 32)
    assert costs.lines["models/layers.py:31"].count == 1 + 5 * 2


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({"stride": "%three"}, 2),
        ({"known": ', backend_config={"known_trip_count":{"n":"4"}}'}, 4),
        # The limit is an element of the tuple that the body passes on: 1.
        ({"condition": "compare(%i, %e), direction=LT\n"
          "  %e = s32[] get-tuple-element(%p), index=2"}, 0),
    ],
    ids=["strides", "known", "limit outside"],
)  # fmt: skip
def test_trip_counts(changes, trips):
    assert count(*loop(**changes), FUSED).cycles == 100 * trips


@pytest.mark.parametrize(
    "changes",
    [
        {"condition": "compare(%i, %limit), direction=NE"},
        {"condition": "compare(%i, %i), direction=LT"},
        {"step": "multiply"},
        {"stride": "%i"},
    ],
)
def test_a_loop_that_does_not_count_to_a_constant_is_refused(changes):
    with pytest.raises(RunError, match="does not count to a constant"):
        count(*loop(**changes), FUSED)


def test_a_branch_is_refused():
    with pytest.raises(RunError, match="branches"):
        count("  ROOT %a = f32[8] conditional(%x, %x, %x), branches={%b, %c}")


def test_collectives_are_told_by_kind_with_the_larger_side_of_each():
    costs = count(
        """  %g = f32[32] all-gather(%x), channel_id=1, dimensions={0}
  %h = f32[64] all-gather(%g), channel_id=2, dimensions={0}
  %s = f32[2] reduce-scatter(%x), channel_id=3, dimensions={0}
  %r = (f32[8], f32[32]) all-reduce(%x, %g), channel_id=4, to_apply=%add
  %p = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%x), channel_id=5
  %q = f32[8] collective-permute-done(%p)
  %t = (f32[8], f32[16]) all-gather-start(%x), channel_id=6
  ROOT %u = f32[16] all-gather-done(%t)"""
    )
    assert dict(costs.collectives) == {
        "all-gather": Cost(count=3, bytes=4 * (32 + 64 + 16)),
        "reduce-scatter": Cost(count=1, bytes=4 * 8),
        "all-reduce": Cost(count=1, bytes=4 * 40),
        "collective-permute": Cost(count=1, bytes=4 * 10),
    }
    assert costs.cycles == 0
    assert costs.copies == Cost()


def test_a_collective_that_runs_beside_computing_counts_once():
    """It appears in the fusions that start it, run beside it, and end it."""
    gather = """%start (p: f32[8]) -> (f32[8], f32[32]) {
  %p = f32[8] parameter(0)
  %g = f32[32] all-gather(%p), channel_id=7, dimensions={0}
  ROOT %c = (f32[8], f32[32]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}"""
    costs = count(
        "  %a = (f32[8], f32[32]) fusion(%x), kind=kCustom, calls=%start\n"
        f"  ROOT %b = f32[8] fusion(%x), kind=kOutput, calls=%beside, {estimated(50)}",
        gather,
        gather.replace("%start", "%beside"),
    )
    assert costs.collectives["all-gather"] == Cost(count=1, bytes=128)
    assert costs.cycles == 50


def test_copies_beside_the_computing_are_told_and_cost_no_cycles():
    costs = count(
        """  %s = (f32[8]{0:S(1)}, f32[8], u32[]) copy-start(%x)
  %d = f32[8]{0:S(1)} copy-done(%s)
  %t = ((f32[8]), f32[2], s32[]) slice-start(%d), slice={[0:2]}
  ROOT %e = f32[2] slice-done(%t)"""
    )
    assert costs.copies == Cost(count=2, bytes=40)
    assert costs.cycles == 0


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(RunError, match="ENTRY"):
        hlo_costs.count("HloModule jit_step\n", V5E)
