"""The folder of one run: who may write there, and with which settings."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from personmae_jax import sharding
from personmae_jax.config_json import (
    Settings,
    config_from_json,
    config_to_json,
    differences,
    dropped_settings,
    parse_object,
)
from personmae_jax.engine import lock
from personmae_jax.engine.storage import open_path, read_whole, write_whole
from personmae_jax.errors import ConfigError, RunError, first_line

# What a later start may change: these settings do not change what is computed, but for
# rounding where a product gets another shape. A name that ends in a dot stands for all
# fields below it.
FREE_FIELDS = (
    "config.data.path",
    "config.data.num_threads",
    "config.data.num_workers",
    "config.data.max_bad_fraction",
    "config.train.accumulate",
    "config.train.remat",
    "config.mesh.",
    "config.checkpoint.",
    "config.log.",
    "config.eval.",
    "config.export.",
    "config.profile.",
)

# What the processes of one run may have of their own.
_PER_PROCESS = (
    "config.data.path",
    "config.data.num_threads",
    "config.data.num_workers",
    "config.eval.path",
)

_LATER = {"records_sha256", "labels_sha256", "scored_sha256"}  # facts

_VISIBLE = 120.0  # seconds until other hosts see a new file; NFS keeps listings for 60
_MAX_SIZE = 1 << 20  # bytes; our files have 3,000 at most

Parsed = TypeVar("Parsed")


class Workdir:
    """Context manager: locks the folder, then compares or writes what a run is.

    That is `config.json`, the settings, and `run.json`, what only the data tell. In a
    run of several processes only process 0 enters it.

    Raises (on entering):
      ConfigError: The folder cannot be written, another run holds it, or it belongs
        to a run with other settings or other data.
    """

    def __init__(
        self,
        path: os.PathLike[str] | str,
        cfg: Settings,
        **facts: int | str,
    ):
        """Touches nothing yet; `facts` are what only the data tell, see `_describe`."""
        self.path = open_path(path)
        self._cfg = cfg
        self._run = facts
        self._lock: lock.FileLock | lock.HeartbeatLock | None = None

    def __enter__(self) -> "Workdir":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.acquire(self.path)
            self._settle()
        except ConfigError:
            self.__exit__()
            raise
        except Exception as e:  # each storage has its own errors
            self.__exit__()
            raise ConfigError(
                f"--workdir={self.path} cannot be written ({first_line(e)}); "
                "name a folder that this user may create and write"
            ) from e
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_held(self) -> None:
        """Raises RunError if the folder was removed or taken over meanwhile."""
        if self._lock is not None and self._lock.is_lost():
            raise RunError(
                f"--workdir={self.path} is no longer this run's: it was removed, or "
                f"another run took it over after {lock.STALE:.0f} s without a sign of "
                "life; go on there, or start again"
            )

    def _settle(self) -> None:
        config, run = self.path / "config.json", self.path / "run.json"
        others = [n for n in ("metrics.jsonl", "pictures") if (self.path / n).exists()]
        if not config.exists() and others:
            raise ConfigError(
                f"--workdir={self.path} holds {' and '.join(others)} without a "
                "run's config.json, of something else; name another folder"
            )
        if config.exists():
            if dropped := _read(config, dropped_settings):
                raise ConfigError(
                    f"the run in --workdir={self.path} has {', '.join(dropped)}, which "
                    "this version no longer supports; continue it with the version "
                    "that began it, or give another --workdir"
                )
            self._compare_config(_read(config, config_from_json))
        if run.exists():
            there = _read(run, parse_object)
            # A version before this one wrote none of `_LATER`.
            later = {k: self._run[k] for k in _LATER & self._run.keys() - there.keys()}
            if there | later != self._run:
                raise ConfigError(
                    f"the data has {_describe(self._run)}, but the run in "
                    f"--workdir={self.path} began with {_describe(there)}; give the "
                    "same data or another --workdir"
                )
        write_whole(config, config_to_json(self._cfg))
        write_whole(run, json.dumps(self._run, indent=2) + "\n")

    def _compare_config(self, there: Settings) -> None:
        if type(there) is not type(self._cfg):
            raise ConfigError(
                f"--workdir={self.path} belongs to a run of another kind; "
                "pretraining, fine-tuning and training without labels each take a "
                "--workdir of their own"
            )
        here = config_from_json(config_to_json(self._cfg))  # in the same types
        if wrong := _differences(there, here, FREE_FIELDS):
            raise ConfigError(
                f"--workdir={self.path} belongs to a run with other settings "
                f"({'; '.join(wrong)}); give the same settings or another --workdir"
            )


def read_settings(path: os.PathLike[str] | str) -> Settings:
    """The settings of the run in the workdir `path`; creates nothing.

    Raises:
      ConfigError: No run is there, or its `config.json` is damaged or of another
        version.
    """
    folder = open_path(path)
    file = folder / "config.json"
    try:
        is_there = file.exists()
    except Exception as e:  # each storage has its own errors
        raise ConfigError(f"{folder} cannot be read ({first_line(e)})") from e
    if not is_there:
        raise ConfigError(f"{folder} holds no run: it has no config.json")
    return _read(file, config_from_json)


def read_num_steps(path: os.PathLike[str] | str) -> int | None:
    """Steps to the end of the run in the workdir `path`; None where nothing tells."""
    file = open_path(path) / "run.json"
    return _read(file, parse_object).get("num_steps") if file.exists() else None


def _read(file: epath.Path, parse: Callable[[str], Parsed]) -> Parsed:
    """`parse` of the text; raises ConfigError if that or reading fails."""
    try:
        return parse(read_whole(file, _MAX_SIZE).decode())
    except (OSError, ValueError) as e:  # ConfigError among them
        raise ConfigError(
            f"{file} cannot be read ({first_line(e)}); restore it or use another "
            "--workdir"
        ) from e


def _describe(run: Mapping[str, Any]) -> str:
    """The facts by which a run is told, as a sentence has them.

    On `num_records` depend the order of the images and, where the settings give epochs,
    all schedules, on `num_steps` too; pseudo labels are kept by the position of an
    image among those that `images_sha256` is of, a classifier's rows by the identities
    of `labels_sha256`; a checkpoint by the scores of `num_queries`.
    """
    people = run.get("num_identities")
    of_people = "" if people is None else f" of {people} identities"
    names = ("images_sha256", "labels_sha256", "records_sha256")
    images = next((run[name] for name in names if name in run), None)
    hashed = "" if images is None else f" (SHA-256 {str(images)[:12]})"
    queries, labels = run.get("num_queries"), run.get("scored_sha256", "")
    scored = "" if queries is None else f", scored by {queries} queries of other data"
    scored += f" (SHA-256 {labels[:12]})" if labels else ""
    return (
        f"{run.get('num_records')} records{of_people}{hashed} for "
        f"{run.get('num_steps')} steps{scored}"
    )


def check_processes_agree(cfg: Settings, facts: Mapping[str, Any]) -> None:
    """Compares settings and data of all processes of a run, before any of them trains.

    Without it each would train a network of its own, or one wait for the others.

    Raises:
      ConfigError: They differ, on every process.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps([config_to_json(cfg), facts]).encode()
    longest = sharding.gather_processes(np.asarray(len(text))).max()
    texts = sharding.gather_processes(np.frombuffer(text.ljust(longest), np.uint8))
    (first, data), *others = [json.loads(row.tobytes()) for row in texts]
    theirs = config_from_json(first)
    for process, (other, other_data) in enumerate(others, 1):
        ours = config_from_json(other)
        wrong = ["another kind of training"]
        if type(theirs) is type(ours):
            wrong = _differences(theirs, ours, _PER_PROCESS)
        if data != other_data:
            wrong.append(
                f"data of {_describe(data)} there, {_describe(other_data)} here"
            )
        if wrong:
            raise ConfigError(
                f"process {process} of this run has other settings or data than "
                f"process 0 ({'; '.join(wrong)}); start all of them alike"
            )


def check_processes_share(path: epath.Path) -> None:
    """Looks on every process for the lock that process 0 holds in the workdir.

    Without it a run whose processes have a folder each would wait for ever at its first
    checkpoint.

    Raises:
      ConfigError: Some do not see it, on every process.
    """
    if jax.process_count() == 1:
        return

    def seen() -> np.ndarray:
        text = json.dumps(lock.holder(path)).encode()
        return np.frombuffer(hashlib.sha256(text).digest(), np.uint8)

    # A file that was looked for too early may count as absent for a while.
    is_main = jax.process_index() == 0
    wanted = sharding.gather_processes(seen() if is_main else np.zeros(32, np.uint8))[0]
    deadline = time.monotonic() + _VISIBLE
    while (seen() != wanted).any() and time.monotonic() < deadline:
        time.sleep(0.5)
    same = sharding.gather_processes((seen() == wanted).all())
    if not same.all():
        raise ConfigError(
            f"--workdir={path} is not one folder on all hosts: process "
            f"{np.argmin(same)} does not see what process 0 has written there; name "
            "one that they share"
        )


def _differences(there: Settings, here: Settings, free: Sequence[str]) -> list[str]:
    """A text for every setting but the free ones that is not equal in both."""
    return [
        f"{name}: {values}"
        for name, values in differences(there, here).items()
        if not any(_is_below(name, one) for one in free)
    ]


def _is_below(name: str, free: str) -> bool:
    return name.startswith(free) if free.endswith(".") else name == free
