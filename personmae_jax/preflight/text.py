"""The report of `preflight` for people."""

from collections.abc import Iterator
from typing import Any

_GIB, _MIB = 2**30, 2**20


def describe(report: dict[str, Any]) -> str:
    """Returns the lines that say what a report of `preflight` holds."""
    return "\n".join(
        [*_head(report), *_memory(report), *_speed(report), *_details(report)]
    )


def _head(report: dict[str, Any]) -> Iterator[str]:
    chips = f"{report['num_chips']:,} {report['device_kind']}"
    yield (
        f"{report['topology']}: {chips}, {report['batch_size']:,} images a step, "
        f"{report['batch_size_per_chip']:,} a chip"
    )
    yield (
        "The compiler's own estimate for chips that are not here; no measurement."
        if report["is_estimate"]
        else "Measured here, on noise, without reading data."
    )
    yield f"Data: {report['data']}. Steps alone are counted, no scores and clusters."


def _memory(report: dict[str, Any]) -> Iterator[str]:
    yield "\nmemory a chip, GiB"
    for kind, num_bytes in report["memory"].items():
        yield f"  {kind:<20}{num_bytes / _GIB:8.2f}"
    limit, verdict = report["hbm_limit_bytes"], ""
    if limit is not None:
        word = "fits" if report["fits"] else "does NOT fit"
        verdict = f" of {limit / _GIB:.2f}: {word}"
    yield f"  {'total':<20}{report['hbm_bytes'] / _GIB:8.2f}{verdict}"
    yield "  (activations: with gradients and the compiler's workspace)"
    if report["largest_batch_size"] is not None:
        a_chip = report["largest_batch_size"] // report["num_chips"]
        yield (
            f"  largest batch that fits: about {report['largest_batch_size']:,}, "
            f"{a_chip:,} a chip (extrapolated, as if memory grew with the batch)"
        )


def _speed(report: dict[str, Any]) -> Iterator[str]:
    yield "\nspeed"
    yield f"  model FLOPs an image {report['model_flops_per_image'] / 1e9:.1f} G"
    seconds = report["step_seconds"]
    if seconds is None:
        return
    if report["estimated_cycles"] is not None:
        yield (
            f"  estimated cycles     {report['estimated_cycles'] / 1e6:.1f} M a step, "
            f"at {report['clock'] / 1e9} GHz"
        )
    yield f"  a step               {1000 * seconds:.1f} ms"
    yield f"  images/s a chip      {report['images_per_second_per_chip']:,.0f}"
    if report["share_of_peak"] is not None:
        share = 100 * report["share_of_peak"]
        yield f"  share of peak        {share:.1f} %{_doubt(report)}"
    days = report["days"]
    time = f"{days:.2f} days" if days >= 1 else f"{24 * days:.2f} hours"
    yield (
        f"  the run              {report['num_steps']:,} steps: "
        f"{time}, {report['chip_hours']:,.1f} chip-hours"
    )


def _doubt(report: dict[str, Any]) -> str:
    """What the share becomes if kernels, counted at their bound, take twice that."""
    cycles = report["estimated_cycles"]
    if cycles is None or not report["kernels"]:
        return ""
    slower = cycles + sum(kernel["cycles"] for kernel in report["kernels"])
    share = 100 * report["share_of_peak"] * cycles / slower
    return f"; {share:.1f} % if the custom calls below take twice as long"


def _details(report: dict[str, Any]) -> Iterator[str]:
    if report["estimated_cycles"] is None:
        return
    yield "\ncostliest source lines, Mcycles a step"
    for row in report["lines"]:
        yield f"  {row['cycles'] / 1e6:8.1f}  {row['name']}"
    yield "\ncustom calls, counted here by max(FLOPs / (0.6 peak), bytes / bandwidth)"
    for row in report["kernels"]:
        yield (
            f"  {row['cycles'] / 1e6:8.1f}  {row['count']} x {row['name']}: "
            f"{row['flops'] / 1e9:.1f} GFLOP, {row['bytes'] / _MIB:.1f} MiB"
        )
    if not report["kernels"]:
        yield "  none"
    others = report["others"]["cycles"] / 1e6
    yield f"  {others:8.1f}  other operations without an estimate, by their bytes"
    yield "\ncollectives a step and chip, not in the cycles"
    for row in report["collectives"]:
        yield f"  {row['count']} x {row['kind']}, {row['bytes'] / _MIB:.1f} MiB"
    if not report["collectives"]:
        yield "  none"
    copies = report["copies"]
    yield (
        f"\n{copies['count']:,} copies, together {copies['bytes'] / _GIB:.1f} GiB, run "
        "beside the computing and are not in the cycles either."
    )
