"""Compiles the step that a run would take, for chips that are not here, and counts it.

The compiler is libtpu's own, so memory is what it has planned, and time what it has
estimated: no measurement. `measure` runs the step on whatever is here instead.
"""

import dataclasses
import math
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from personmae_jax import sharding
from personmae_jax.config import Config
from personmae_jax.config_check import check
from personmae_jax.engine.distributed import device_errors
from personmae_jax.engine.program import Program
from personmae_jax.engine.storage import reporting_failure
from personmae_jax.errors import RunError, first_line
from personmae_jax.preflight import hlo_costs
from personmae_jax.preflight.chips import CHIPS, Chip, absent_devices
from personmae_jax.preflight.model_flops import model_flops_per_image
from personmae_jax.pretrain import program as programs

LUPERSON = 4_180_243  # images; Fu et al., arXiv 2012.03753
_WARM_UP, _MEASURED = 2, 10  # steps of `measure`

Report = dict[str, Any]


def estimate(
    cfg: Config,
    topology: str,
    num_records: int = LUPERSON,
    dump_hlo: str | None = None,
) -> Report:
    """Compiles for a topology, as `absent_devices` takes it, and counts.

    The compiled text goes into the file `dump_hlo`; no data is asked for.

    Returns:
      What `describe` prints, ready for JSON; the times are None, and there are no
      collectives, where the step does not fit.

    Raises:
      ConfigError: The topology does not exist, or the settings do not suit it.
      RunError: libtpu is not installed, or the program cannot be counted.
    """
    chip, devices = absent_devices(topology)
    program = _build(cfg, devices, num_records)
    report = _describe_run(program, topology) | {"is_estimate": True}
    compiled, fitting = _compile_fitting(program)
    report |= _memory(program, int(chip.hbm_gib * 2**30), compiled, fitting)
    if compiled is None or fitting < cfg.train.batch_size:
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
    cfg: Config, num_records: int = LUPERSON, dump_hlo: str | None = None
) -> Report:
    """Runs a few steps on the devices of this host, on noise; else as `estimate`."""
    devices = jax.devices()
    chip = next((c for c in CHIPS.values() if devices[0].device_kind in c.kinds), None)
    program = _build(cfg, devices, num_records)
    report = _describe_run(program, "here") | {"is_estimate": False}
    hint = "a smaller --config.train.batch_size or --config.train.remat=block"
    with device_errors(hint):
        compiled = _compile(program)
        _text(compiled, dump_hlo)
        seconds = _step_seconds(program, compiled)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    report |= _memory(program, limit, compiled, cfg.train.batch_size)
    return report | _speed(program, seconds, chip)


def _build(cfg: Config, devices: list[Any], num_records: int) -> Program[Config]:
    # Named, or `check` would ask for it.
    data = dataclasses.replace(cfg.data, path=cfg.data.path or "DIR")
    cfg = dataclasses.replace(cfg, data=data)
    check(cfg, len(devices))
    num_steps = programs.count_steps(cfg, num_records)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    return programs.build(cfg, mesh, num_steps)


def _compile(program: Program[Config]) -> jax.stages.Compiled:
    step: Any = program.train_step
    return step.lower(program.abstract_state, program.abstract_batch).compile()


def _compile_fitting(
    program: Program[Config],
) -> tuple[jax.stages.Compiled | None, int]:
    """Compiles with the batch size asked for, or halves it until the step fits.

    Returns:
      The compiled step, and its batch size; None and 0 where not even one image a
      chip fits.
    """
    cfg, mesh = program.cfg, program.mesh
    parts = mesh.size * cfg.train.accumulate
    batch_size = cfg.train.batch_size
    while batch_size:
        train = dataclasses.replace(cfg.train, batch_size=batch_size)
        smaller = dataclasses.replace(cfg, train=train)
        try:
            return (
                _compile(programs.build(smaller, mesh, program.num_steps)),
                batch_size,
            )
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
        batch_size = batch_size // 2 // parts * parts
    return None, 0


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


def _step_seconds(program: Program[Config], step: jax.stages.Compiled) -> float:
    """Median seconds of a step."""
    state = program.init_state()
    batch = sharding.to_devices(noise(program), program.mesh)
    seconds = []
    for _ in range(_WARM_UP + _MEASURED):
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - begin)
    if not np.isfinite(metrics["loss"]):
        raise RunError("the loss of a step on noise is not finite; fix the settings")
    return statistics.median(seconds[_WARM_UP:])


def noise(program: Program[Config]) -> dict[str, np.ndarray]:
    """Returns a batch whose pixels are noise; masks and boxes do not matter to time."""
    rng = np.random.default_rng(0)
    rows = {
        name: rng.integers(0, 256, leaf.shape, np.uint8)
        for name, leaf in program.abstract_batch.items()
        if leaf.dtype == np.uint8
    }
    b, num_visible = program.abstract_batch["visible"].shape
    rows["visible"] = np.tile(np.arange(num_visible, dtype=np.int32), (b, 1))
    rows["geometry"] = np.tile(np.array([0, 0, 1, 1], np.float32), (b, 1))
    return rows


def _describe_run(program: Program[Config], topology: str) -> Report:
    cfg, num_chips = program.cfg, program.mesh.size
    return {
        "topology": topology,
        "device_kind": program.mesh.devices.flat[0].device_kind,
        "num_chips": num_chips,
        "batch_size": cfg.train.batch_size,
        "batch_size_per_chip": cfg.train.batch_size // num_chips,
        "num_steps": program.num_steps,
        "model_flops_per_image": model_flops_per_image(cfg),
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


def _speed(program: Program[Config], step_seconds: float, chip: Chip | None) -> Report:
    cfg, num_chips = program.cfg, program.mesh.size
    rate = cfg.train.batch_size / num_chips / step_seconds
    flops = rate * model_flops_per_image(cfg)
    hours = program.num_steps * step_seconds / 3600
    return {
        "step_seconds": step_seconds,
        "images_per_second_per_chip": rate,
        "share_of_peak": None if chip is None else flops / chip.peak_flops,
        "days": hours / 24,
        "chip_hours": hours * num_chips,
    }


def _memory(
    program: Program[Config],
    limit: int | None,
    compiled: jax.stages.Compiled | None,
    fitting: int,
) -> Report:
    """Bytes on one chip while a step runs, and what it has, None where nobody knows.

    `compiled` is the step with `fitting` images, None if no batch fits. What it takes,
    batch and activations, is taken to grow with the batch.
    """
    state, batch = program.abstract_state, program.abstract_batch
    asked = program.cfg.train.batch_size
    memory = {
        "parameters": _bytes_per_chip(state.params),
        "optimizer": _bytes_per_chip(state.opt_state),
        "teacher": _bytes_per_chip(state.teacher_params),
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
            parts = program.mesh.size * program.cfg.train.accumulate
            largest = room * asked // growing // parts * parts
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
