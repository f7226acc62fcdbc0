"""Compiles the step that a run would take, for chips that are not here, and counts it.

The compiler is libtpu's own, so memory is what it has planned, and time what it has
estimated: no measurement. `measure` runs the step on whatever is here instead.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from personmae_jax import sharding
from personmae_jax.engine.distributed import device_errors
from personmae_jax.engine.program import Program
from personmae_jax.engine.storage import reporting_failure
from personmae_jax.errors import RunError, first_line
from personmae_jax.preflight import hlo_costs, trainings
from personmae_jax.preflight.chips import CHIPS, Chip, absent_devices
from personmae_jax.preflight.model_flops import model_flops_per_image
from personmae_jax.preflight.trainings import Settings

_WARM_UP, _MEASURED = 2, 10  # steps of `measure`
_KINDS = {  # of what a state holds
    "params": "parameters",
    "opt_state": "optimizer",
    "teacher_params": "teacher",
    "memory": "cluster memory",
}

Report = dict[str, Any]


def estimate(
    cfg: Settings,
    topology: str,
    num_records: int | None = None,
    dump_hlo: str | None = None,
) -> Report:
    """Compiles for a topology, as `absent_devices` takes it, and counts.

    The compiled text goes into the file `dump_hlo`; no data is asked for. Absent
    `num_records` are those of LUPerson or, where people are trained on, Market-1501.

    Returns:
      What `describe` prints, ready for JSON; the times are None, and there are no
      collectives, where the step does not fit.

    Raises:
      ConfigError: The topology does not exist, or the settings do not suit it.
      RunError: libtpu is not installed, or the program cannot be counted.
    """
    chip, devices = absent_devices(topology)
    num_records, data = trainings.assume(cfg, num_records)
    build = functools.partial(trainings.build, devices=devices, num_records=num_records)
    program = build(cfg)
    report = _describe_run(program, topology, data) | {"is_estimate": True}
    compiled, fitting = _compile_fitting(program, build)
    report |= _memory(program, int(chip.hbm_gib * 2**30), compiled, fitting)
    if compiled is None or fitting < program.batch_size:
        return report
    text = _text(compiled, dump_hlo)
    costs = hlo_costs.count(text, chip)
    return (
        report
        | _speed(program, costs.cycles / chip.clock, chip)
        | {
            "estimated_cycles": round(costs.cycles),
            "compiler_cycles": round(costs.compiler_cycles),
            "clock": chip.clock,
            "kernels": _rows(costs.kernels),
            "others": dataclasses.asdict(costs.others),
            "collectives": [
                {"kind": kind, "count": cost.count, "bytes": cost.bytes}
                for kind, cost in costs.collectives.items()
            ],
            "copies": dataclasses.asdict(costs.copies),
            "lines": _rows(costs.lines)[:12],
        }
    )


def measure(
    cfg: Settings, num_records: int | None = None, dump_hlo: str | None = None
) -> Report:
    """Runs a few steps on the devices of this host, on noise; else as `estimate`."""
    devices = jax.devices()
    chip = next((c for c in CHIPS.values() if devices[0].device_kind in c.kinds), None)
    num_records, data = trainings.assume(cfg, num_records)
    program = trainings.build(cfg, devices, num_records)
    report = _describe_run(program, "here", data) | {"is_estimate": False}
    smaller = f"--config.{trainings.batch_setting(cfg)}"
    hint = f"a smaller {smaller} or --config.train.remat=block"
    with device_errors(hint):
        compiled = _compile(program)
        _text(compiled, dump_hlo)
        seconds = _step_seconds(program, compiled)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    report |= _memory(program, limit, compiled, program.batch_size)
    return report | _speed(program, seconds, chip)


def _compile(program: Program[Any]) -> jax.stages.Compiled:
    step: Any = program.train_step
    return step.lower(program.abstract_state, program.abstract_batch).compile()


def _compile_fitting(
    program: Program[Any], build: Callable[[Settings], Program[Any]]
) -> tuple[jax.stages.Compiled | None, int]:
    """Compiles with the batch size asked for, or halves it until the step fits.

    Returns:
      The compiled step, and its batch size; None and 0 where not even the smallest
      batch fits.
    """
    unit = trainings.batch_unit(program.cfg, program.mesh.size)
    while True:
        try:
            return _compile(program), program.batch_size
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
        batch_size = program.batch_size // 2 // unit * unit
        if not batch_size:
            return None, 0
        program = build(trainings.with_batch_size(program.cfg, batch_size))


def _text(compiled: jax.stages.Compiled, dump_hlo: str | None) -> str:
    """The compiled text, which goes into a file too."""
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as e:
        raise RunError(
            f"the step was compiled, but cannot be read back ({first_line(e)}), a "
            "fault of this jaxlib with some programs; try another topology or batch "
            "size"
        ) from e
    if dump_hlo is not None:
        with reporting_failure(f"--dump-hlo={dump_hlo}"):
            pathlib.Path(dump_hlo).write_text(text, encoding="utf-8")
    return text


def _step_seconds(program: Program[Any], step: jax.stages.Compiled) -> float:
    """Median seconds of a step."""
    state = trainings.initial_state(program)
    batch = sharding.to_devices(noise(program), program.mesh)
    seconds = []
    for _ in range(_WARM_UP + _MEASURED):
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - begin)
    if not np.isfinite(metrics["loss"]):
        raise RunError("the loss of a step on noise is not finite; fix the settings")
    return statistics.median(seconds[_WARM_UP:])


def noise(program: Program[Any]) -> dict[str, np.ndarray]:
    """Returns a batch whose pixels are noise; what else it has does not matter to time.

    The first patches are visible, boxes are whole, labels and cameras 0.
    """
    rng = np.random.default_rng(0)
    rows = {
        name: rng.integers(0, 256, leaf.shape, np.uint8)
        if leaf.dtype == np.uint8
        else np.zeros(leaf.shape, leaf.dtype)
        for name, leaf in program.abstract_batch.items()
    }
    if "visible" in rows:
        rows["visible"][:] = np.arange(rows["visible"].shape[-1])
        rows["geometry"][:] = (0, 0, 1, 1)
    return rows


def _describe_run(program: Program[Any], topology: str, data: str) -> Report:
    num_chips = program.mesh.size
    return {
        "topology": topology,
        "device_kind": program.mesh.devices.flat[0].device_kind,
        "num_chips": num_chips,
        "data": data,
        "batch_size": program.batch_size,
        "batch_size_per_chip": program.batch_size // num_chips,
        "num_steps": program.num_steps,
        "model_flops_per_image": model_flops_per_image(program.cfg),
    } | dict.fromkeys(
        (
            "step_seconds",
            "images_per_second_per_chip",
            "share_of_peak",
            "days",
            "chip_hours",
            "estimated_cycles",
            "collectives",
        )
    )


def _speed(program: Program[Any], step_seconds: float, chip: Chip | None) -> Report:
    num_chips = program.mesh.size
    rate = program.batch_size / num_chips / step_seconds
    flops = rate * model_flops_per_image(program.cfg)
    hours = program.num_steps * step_seconds / 3600
    return {
        "step_seconds": step_seconds,
        "images_per_second_per_chip": rate,
        "share_of_peak": None if chip is None else flops / chip.peak_flops,
        "days": hours / 24,
        "chip_hours": hours * num_chips,
    }


def _memory(
    program: Program[Any],
    limit: int | None,
    compiled: jax.stages.Compiled | None,
    fitting: int,
) -> Report:
    """Bytes on one chip while a step runs, and what it has, None where nobody knows.

    `compiled` is the step with `fitting` images, None if no batch fits. What it takes,
    batch and activations, is taken to grow with the batch.
    """
    state, batch = program.abstract_state, program.abstract_batch
    asked = program.batch_size
    memory = {
        kind: _bytes_per_chip(getattr(state, name))
        for name, kind in _KINDS.items()
        if hasattr(state, name)
    }
    held, largest = sum(memory.values()), 0
    if compiled is not None:
        stats: Any = compiled.memory_analysis()
        memory["batch"] = _bytes_per_chip(batch)
        memory["activations"] = stats.temp_size_in_bytes * asked // fitting
        memory["program and padding"] = (
            stats.generated_code_size_in_bytes
            + stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
            - held
            - memory["batch"] * fitting // asked
        )
        if limit is not None:
            growing = memory["batch"] + memory["activations"]
            room = max(0, limit - sum(memory.values()) + growing)
            unit = trainings.batch_unit(program.cfg, program.mesh.size)
            largest = room * asked // growing // unit * unit
    total = sum(memory.values())
    return {
        "memory": memory,
        "hbm_bytes": total,
        "hbm_limit_bytes": limit,
        "fits": None if limit is None else fitting == asked and total <= limit,
        "largest_batch_size": None if limit is None else largest,
    }


def _bytes_per_chip(tree: PyTree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _rows(costs: dict[str, hlo_costs.Cost]) -> list[dict[str, Any]]:
    """The costliest first."""
    rows = [{"name": n} | dataclasses.asdict(cost) for n, cost in costs.items()]
    return sorted(rows, key=lambda row: -row["cycles"])
