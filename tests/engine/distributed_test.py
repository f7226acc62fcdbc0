import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from personmae_jax.engine import distributed
from personmae_jax.errors import ConfigError

REPOSITORY = pathlib.Path(__file__).parents[2]

LOOP = """
import ast
import sys
from etils import epath
import jax
from personmae_jax.engine import distributed
from personmae_jax.engine.checkpoint import Checkpoints

distributed.initialize(*ast.literal_eval(sys.argv[2]))
mesh = jax.make_mesh((jax.device_count(),), ("data",))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
state = {"x": jax.jit(lambda: jax.numpy.zeros(3), out_shardings=everywhere)()}
with Checkpoints(epath.Path(sys.argv[1]), keep=1, config={}) as checkpoints:
    for step in range(1, 10**9):
        state = jax.tree.map(lambda x: x + 1, state)
        if step == 3:
            ports = [holder.getsockname()[1] for holder in distributed._reserved]
            print("ready", *ports or "-", flush=True)
        if checkpoints.reached_preemption(step):
            checkpoints.save(step, state)
            break
print("saved", step)
sys.exit(75)
"""

# A main thread that is busy outside Python, as in a long compilation.
BUSY = """
import ctypes
from personmae_jax.engine import distributed
distributed.initialize()
print("ready -", flush=True)
mutex = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever; signals do not end it
"""


@contextlib.contextmanager
def start(code: str, *arguments: object, **environment: object):
    """Runs `code` in a process of its own, for as long as the context lasts."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_ready(process: subprocess.Popen) -> str:
    """The coordinator's port that it prints."""
    for line in process.stdout:  # Gloo prints lines of its own
        if line.startswith("ready"):
            return line.split()[1]
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_the_first_ctrl_c_save_at_a_step_and_exit_75(tmp_path, number):
    with start(LOOP, tmp_path, ()) as process:
        wait_until_ready(process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    step = output.split()[-1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [step]


@pytest.mark.slow
def test_the_second_ctrl_c_leaves_at_once_whatever_the_main_thread_does():
    with start(BUSY) as process:
        wait_until_ready(process)
        process.send_signal(signal.SIGINT)
        while "press Ctrl-C again" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


@pytest.mark.slow
def test_two_runs_at_once_use_ports_of_their_own(tmp_path):
    with start(LOOP, tmp_path / "a", ()) as a, start(LOOP, tmp_path / "b", ()) as b:
        assert wait_until_ready(a) != wait_until_ready(b)
        a.send_signal(signal.SIGTERM)
        assert a.wait(timeout=60) == 75
        assert b.poll() is None  # it was not told
        b.send_signal(signal.SIGTERM)
        assert b.wait(timeout=60) == 75


@pytest.mark.slow
def test_a_sigterm_to_one_of_two_hosts_stops_both_at_the_same_step(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    with (
        start(LOOP, tmp_path, (address, 2, 0)) as first,
        start(LOOP, tmp_path, (address, 2, 1)) as second,
    ):
        wait_until_ready(first)
        wait_until_ready(second)
        second.send_signal(signal.SIGTERM)
        outputs = [p.communicate(timeout=60)[0] for p in (first, second)]
    assert [first.returncode, second.returncode] == [75, 75]
    steps = {output.split()[-1] for output in outputs}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == steps
    assert len(steps) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


WAIT = """
import ast
import sys
from personmae_jax.engine import distributed, signals
signals.leave_at_once("")
signals._SHORT = 0.1
distributed._WAIT = float(sys.argv[1])
distributed.join("127.0.0.1:9", 2, 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_wait_for_the_other_processes_says_so_and_ends_at_a_signal(number):
    with start(WAIT, 300) as process:
        said = process.stderr.readline()
        assert "waiting for the 2 processes of --coordinator=127.0.0.1:9" in said
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in rest


@pytest.mark.slow
def test_a_wait_for_the_other_processes_has_an_end():
    with start(WAIT, 1) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "waited 1 s in vain for the 2 processes" in line


@pytest.mark.parametrize(
    "given", [("a:1", None, None), (None, 2, 0), ("a:1", 2, None), (None, None, 0)]
)
def test_half_a_description_of_the_cluster_is_refused(given):
    with pytest.raises(ConfigError, match="make no cluster; give all three, or none"):
        distributed.initialize(*given)


@pytest.mark.parametrize("process_id", [-1, 2])
def test_a_process_that_is_not_among_them_is_refused(process_id):
    with pytest.raises(ConfigError, match=r"is not in 0 \.\. 1"):
        distributed.initialize("a:1", 2, process_id)


@pytest.mark.parametrize("coordinator", ["localhost", "a:", "a:x", "a:0", "a:65536"])
def test_a_coordinator_without_a_port_is_refused(coordinator):
    with pytest.raises(ConfigError, match="has no port of 1 to 65535; give HOST:PORT"):
        distributed.initialize(coordinator, 2, 1)


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


@pytest.fixture
def cluster(monkeypatch):
    """What jax would be told, in an environment of Slurm with the given variables."""
    called = {}
    monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setattr(
        distributed.jax.distributed,
        "initialize",
        lambda *arguments, **named: called.update(named, arguments=arguments),
    )

    def join(**variables: str):
        called.clear()
        for name, value in (SLURM | variables).items():
            monkeypatch.setenv(name, value)
        joined = distributed.join()
        port = os.environ.get("JAX_COORDINATOR_PORT")
        monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
        return joined, called, port

    return join


def test_one_task_a_node_has_all_of_its_devices(cluster):
    # jax would take the one device with the task's number on its node.
    assert cluster()[1]["local_device_ids"] == []
    assert cluster(SLURM_STEP_TASKS_PER_NODE="8(x2)")[1]["local_device_ids"] is None
    assert cluster(JAX_LOCAL_DEVICE_IDS="3")[1]["local_device_ids"] is None


def test_ranks_of_mpirun_in_a_job_of_slurm_are_those_of_open_mpi(cluster):
    mpi = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    joined, called, port = cluster(SLURM_NTASKS="1", **mpi)
    assert joined
    assert (called["local_device_ids"], port) == (None, None)


def test_a_single_task_joins_nobody_and_has_all_devices(cluster, monkeypatch):
    joined, called, _ = cluster(SLURM_NTASKS="1", SLURM_STEP_TASKS_PER_NODE="1")
    assert (joined, called) == (False, {})
    monkeypatch.setattr(distributed.signals, "interrupt_as_sigterm", lambda: None)
    monkeypatch.setattr(distributed, "_reserved", [])
    distributed.initialize()
    assert (called["local_device_ids"], called["num_processes"]) == ([], 1)
    distributed._reserved[0].close()


def test_two_steps_of_one_job_have_ports_of_their_own(cluster):
    # On jax's own port, of the job, the second one would end the first.
    first, second = (cluster(SLURM_STEP_ID=step)[2] for step in "01")
    assert first != second
    assert all(61440 <= int(port) < 65536 for port in (first, second))


def test_a_reserved_port_is_given_to_no_other_run(monkeypatch):
    monkeypatch.setattr(distributed, "_reserved", [])
    ports = [distributed._reserve_port() for _ in range(500)]
    assert len(set(ports)) == 500
    with socket.socket() as other:  # gRPC's own can still listen there
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", ports[0]))
        other.listen()
    for holder in distributed._reserved:
        holder.close()
