"""Real processes of one run on this machine, as they start on several hosts."""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence

from distributed_test import free_port
from launching import ROOT, environment

GLOO = {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def with_devices(env: dict[str, str], count: int) -> dict[str, str]:
    """The environment of a process that has so many devices."""
    flags = f"{env['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return env | {"XLA_FLAGS": flags}


@contextlib.contextmanager
def start_hosts(
    command: Sequence[str],
    count: int,
    env: dict[str, str],
    more: Sequence[Sequence[str]] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """So many processes of one run, one if it is alone; killed when left.

    Each may be given more words.
    """
    cluster = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    processes = [
        subprocess.Popen(
            [
                *(*command, *(more[i] if more else ())),
                *([*cluster, f"--process_id={i}"] if count > 1 else ()),
            ],
            cwd=ROOT,
            env=environment(env),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # closes its pipe, too


def assert_all_end(
    processes: Sequence[subprocess.Popen], code: int, timeout: float = 300
) -> list[str]:
    """Waits for the processes, which must leave with this code; what they said."""
    said = [process.communicate(timeout=timeout)[1] for process in processes]
    assert [p.returncode for p in processes] == [code] * len(processes), "\n".join(said)
    return said
