"""Joins the processes of a run, which a SIGTERM to one of them then ends together."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator

import jax

from personmae_jax.engine import signals
from personmae_jax.errors import ConfigError, RunError, first_line

# Seconds for the other processes to start; ours, since each may copy its data first.
_WAIT = 1800.0
# What XLA, Gloo and jax's service call it when a process cannot be reached.
_STATUS = re.compile("UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|DEADLINE_EXCEEDED|CANCELLED")

# Ours for as long as this process lives: see `_reserve_port`.
_reserved: list[socket.socket] = []


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Finds the other processes of this run, or starts a run of one process.

    Call it before any device work. From then on SIGTERM no longer kills: it makes
    `Checkpoints.reached_preemption` true on all hosts at the same step. The first
    Ctrl-C does the same, the second one leaves at once.

    Args and Raises: As of `join`.
    """
    if not join(coordinator, num_processes, process_id):
        address = f"127.0.0.1:{_reserve_port()}"
        jax.distributed.initialize(
            address,
            num_processes=1,
            process_id=0,
            coordinator_bind_address=address,  # the default is all interfaces
            local_device_ids=_local_devices(1),
            # Else a process that was suspended for long would count as dead.
            heartbeat_timeout_seconds=10**6,
        )
    signals.interrupt_as_sigterm()


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> bool:
    """Finds the other processes of this run; returns whether it is to have any.

    Clusters that `jax.distributed.initialize` knows (Cloud TPU, GKE, Slurm, Open MPI)
    are found by it. Elsewhere every process is told all three:

    Args:
      coordinator: HOST:PORT of process 0, a free port that all others reach.
      num_processes: Of the run.
      process_id: Of this one, from 0.

    Raises:
      ConfigError: Some but not all are given, or they make no cluster.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and any(value is not None for value in given):
        raise ConfigError(
            f"--coordinator={coordinator} --num_processes={num_processes} "
            f"--process_id={process_id} make no cluster; give all three, or none for a "
            "run of one process or on a cluster that jax knows"
        )
    if num_processes is not None and num_processes < 1:
        raise ConfigError(f"--num_processes={num_processes} is less than 1")
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise ConfigError(
            f"--process_id={process_id} is not in 0 .. {num_processes - 1}, one less "
            "than --num_processes"
        )
    port = re.fullmatch(r".+:([1-9]\d{0,4})", coordinator or "")
    if coordinator is not None and (port is None or int(port[1]) > 65535):
        raise ConfigError(
            f"--coordinator={coordinator} has no port of 1 to 65535; give HOST:PORT, "
            f"e.g. {coordinator.partition(':')[0]}:12345, a free one of its host"
        )
    others = (
        "the other processes of the cluster that jax finds in the environment (Slurm, "
        "Open MPI, Cloud TPU); start all of them, e.g. with srun"
    )
    if coordinator is not None:
        others = (
            f"the {num_processes} processes of --coordinator={coordinator}, of which "
            f"this is --process_id={process_id}; start all of them, and see that each "
            "reaches that address"
        )
    # Open MPI before Slurm, as in jax: mpirun's processes see the variables of both.
    mpi_tasks = _number("OMPI_COMM_WORLD_SIZE")
    if coordinator is None and (mpi_tasks or _number("SLURM_NTASKS")) == 1:
        return False
    job = _number("SLURM_JOB_ID")
    if coordinator is None and mpi_tasks is None and job is not None:
        # jax's own port is the job's, whose other steps would end this one.
        port_of_step = (job + 997 * (_number("SLURM_STEP_ID") or 0)) % 4096 + 61440
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(port_of_step))
    try:
        with signals.ending_a_wait(others, _WAIT):
            jax.distributed.initialize(
                coordinator,
                num_processes=num_processes,
                process_id=process_id,
                local_device_ids=_local_devices(_tasks_of_node()),
                initialization_timeout=10 * int(_WAIT),  # it would abort the process
            )
    except ValueError as e:
        # Its way to say that there is no cluster.
        if "coordinator_address should be defined" not in str(e):
            raise ConfigError(
                f"the processes of this run cannot be joined ({first_line(e)}); fix "
                "--coordinator=HOST:PORT, --num_processes and --process_id"
            ) from e
        return False
    return True


@contextlib.contextmanager
def device_errors(hint: str) -> Iterator[None]:
    """Turns what devices and other processes do into one line; `hint` saves memory.

    Raises:
      RunError: The memory of a device does not suffice, or another process has died.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as e:  # XLA's come as either
        if "RESOURCE_EXHAUSTED" in str(e):
            raise RunError(
                f"out of memory on the device ({first_line(e)}); use {hint}"
            ) from e
        if lost := lost_process(e):
            raise lost from e
        raise


def lost_process(error: BaseException) -> RunError | None:
    """What to raise if `error` means that another process of the run has gone."""
    if jax.process_count() == 1 or not _STATUS.match(str(error)):
        return None
    return RunError(
        f"another process of this run has died or cannot be reached "
        f"({first_line(error)[:300]}); its log tells why; start all of them again to "
        "go on from the last checkpoint"
    )


def _local_devices(num_tasks: int | None) -> list[int] | None:
    """What tells jax to use all devices of a node that has one process.

    It would use one, the number of the process on its node, wherever it finds Slurm or
    Open MPI. None: jax decides.
    """
    is_named = "JAX_LOCAL_DEVICE_IDS" in os.environ
    return [] if num_tasks == 1 and not is_named else None


def _tasks_of_node() -> int | None:
    # Slurm's is of all nodes, such as 8(x2); of unequal ones jax decides.
    return _number("OMPI_COMM_WORLD_LOCAL_SIZE") or _number("SLURM_STEP_TASKS_PER_NODE")


def _number(name: str) -> int | None:
    """The number in an environment variable, if it is one."""
    found = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ.get(name, ""))
    return None if found is None else int(found[1])


def _reserve_port() -> int:
    """A port of the loopback interface that no other run on this machine gets.

    gRPC listens with SO_REUSEPORT, so two runs on one port would not fail but mix.
    The kernel gives no port away that a socket is bound to, listening or not, hence
    this one stays open.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    _reserved.append(holder)
    return holder.getsockname()[1]
