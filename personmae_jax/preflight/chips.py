"""TPU chips, what they can do, and devices to compile for where there are none."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from personmae_jax.errors import ConfigError, RunError, first_line

_MOST = 8960  # chips of the largest pod, v5p's


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip, all its cores together.

    Sources: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e for `peak_flops` and
    `hbm_bandwidth`. They tell no clock: it is that peak over the FLOPs of one cycle
    (2 for every cell of the matrix units: 8 of 128 x 128 in v4 and v5p, 4 in v5e; v6e
    makes 524,288), rounded. For `hbm_gib`, which they round, what libtpu 0.0.52
    calls available where it refuses a program.
    """

    name: str  # as topologies have it, e.g. "v5e"
    kinds: tuple[str, ...]  # what jax calls it, `Device.device_kind`
    clock: float  # cycles a second
    peak_flops: float  # multiplications and additions in bfloat16 a second
    hbm_gib: float  # that one program may use
    hbm_bandwidth: float  # bytes a second


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 1.05e9, 275e12, 30.75, 1200e9),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 1.5e9, 197e12, 15.75, 819e9),
        Chip("v5p", ("TPU v5", "TPU v5p"), 1.75e9, 459e12, 95.73, 2765e9),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 1.75e9, 918e12, 31.24, 1638e9),
    )
}


def absent_devices(topology: str) -> tuple[Chip, list[Any]]:
    """Returns chips to compile for, one device each, without any.

    jax sees no other devices afterwards than these and the CPU's. A topology is chip
    and shape, e.g. "v5e:4x4".

    Raises:
      ConfigError: There is no such topology.
      RunError: libtpu is not installed.
    """
    name, _, shape = topology.partition(":")
    sizes = re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape)
    # libtpu aborts the process at a flat chip's third dimension, or takes it.
    is_flat = name in ("v5e", "v6e")
    if name not in CHIPS or not sizes or is_flat and shape.count("x") != 1:
        raise ConfigError(
            f"--topology={topology} is none: it is one of {', '.join(CHIPS)} and a "
            "shape in chips, e.g. v5e:4x4 or v4:2x2x4"
        )
    num_chips = math.prod(map(int, shape.split("x")))
    if num_chips > _MOST:
        raise ConfigError(
            f"--topology={topology} has {num_chips:,} chips; no pod has more than "
            f"{_MOST:,}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise RunError(
            "compiling for TPU needs libtpu, which is not installed: "
            "pip install libtpu==0.0.52"
        )
    # Of this process alone: libtpu shall ask no cloud where it runs, keep no log, take
    # no lock (it touches no chip), and not warn that it finds none.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")
    # A v4 chip would be two devices, but Cloud TPU makes it one.
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except jax.errors.JaxRuntimeError as e:
        raise ConfigError(
            f"--topology={topology} is refused by libtpu ({first_line(e)}); shapes "
            "that exist: cloud.google.com/tpu/docs"
        ) from e
    return CHIPS[name], devices
