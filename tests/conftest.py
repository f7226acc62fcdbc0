"""What every test relies on: 8 CPU devices, strict shapes, no warning unseen."""

import os
import time

import jax
import pytest
from absl import flags

# Compiling is most of a test's time, and unoptimised it takes a quarter; XLA reads
# this when the first device is asked for. jax 0.11 knows the first flag only.
_QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, or one of two workers ends alone with them."""
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _parsed_flags():
    """Grain's worker processes refuse to start before absl flags are parsed."""
    flags.FLAGS.mark_as_parsed()


class Clock:
    """`time.monotonic` by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def no_preemption(monkeypatch):
    """Steps after which a run is interrupted, none as yet.

    One process that never joined a cluster is never asked to leave.
    """
    from personmae_jax.engine.checkpoint import Checkpoints

    steps: set[int] = set()
    monkeypatch.setattr(
        Checkpoints, "reached_preemption", lambda self, step: step in steps
    )
    return steps


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> dict[str, str]:
    """Environment of processes that compile as fast as we do, and the same once."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
