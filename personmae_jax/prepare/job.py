"""From folders, zip, tar and LMDB to a tfds data set of ArrayRecord shards.

The order of things, each of which survives being killed: a plan and one task a shard
(`plan.py`), with --drop-duplicates a digest of every member, the shards
(`shard.py`), and at the end `dataset_info.json` (`summary.py`), without
which tfds opens nothing.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from etils import epath

from personmae_jax import foreign_files
from personmae_jax.engine import lock, signals
from personmae_jax.engine.storage import reporting_failure
from personmae_jax.errors import ConfigError
from personmae_jax.prepare.manifest import find_copies
from personmae_jax.prepare.plan import (
    Plan,
    Request,
    describe,
    has_tasks,
    is_finished,
    make_plan,
    read_plan,
    refuse_another,
    refuse_other_archives,
)
from personmae_jax.prepare.pool import worker_pool
from personmae_jax.prepare.shard import (
    is_written,
    read_digests,
    write_copies,
    write_shard,
)
from personmae_jax.prepare.sources import find_sources
from personmae_jax.prepare.summary import finish, summary_text
from personmae_jax.prepare.task import is_task_file, remove_tasks, task_files

# Runs `function(folder, shard)` for every shard of those given.
RunShards = Callable[[Callable[[str, int], Any], str, Plan, Sequence[int]], object]

# What this package writes under another name until it is whole, outside of `tasks`.
_PART = re.compile(
    r"((plan\.json|summary\.json|rejected\.csv)|(checks/\d{5,}\.npz|"
    r"persons-train\.array_record-\d{5,}-of-\d{5,})\.[0-9a-f]{32})\.part",
    re.ASCII,
)
_MAX_LOCK = 4096  # bytes; ours have 200


class Interrupted(BaseException):  # else a reader takes it for damage of its file
    """SIGTERM or Ctrl-C; what is finished stays."""


def prepare(request: Request, out: str, run_shards: RunShards) -> int:
    """Prepares a data set, or goes on where an earlier start was stopped.

    Returns:
      The exit code: 0 finished, 75 interrupted.

    Raises:
      ConfigError: Wrong arguments; nothing was done.
      RunError: A failure; the finished shards stay good.
    """
    folder = epath.Path(os.path.abspath(out))
    _open_folder(folder, request)  # refuses before anything is written
    if is_finished(folder) and not _leftovers(folder):
        print(f"{folder} is finished already")
        print(summary_text(folder))
        return 0
    held = _lock(folder)
    try:
        with signals.raised(Interrupted):
            plan = _open_folder(folder, request)  # before the lock another was at work
            if plan is None or not is_finished(folder):
                if plan is None or not has_tasks(folder, plan):
                    plan = _make_plan(folder, request, plan)
                else:
                    refuse_other_archives(folder, plan)
                _work(folder, plan, run_shards)
            remove_tasks(folder)
    except Interrupted:
        print(
            f"interrupted; the finished shards in {folder} stay: start again with the "
            "same command to go on",
            file=sys.stderr,
        )
        return 75
    finally:
        for left in _leftovers(folder):
            if left.suffix == ".part":
                left.unlink(missing_ok=True)
        held.release()
    print(summary_text(folder))
    return 0


def _work(folder: epath.Path, plan: Plan, run_shards: RunShards) -> None:
    if plan.request["drop_duplicates"]:
        _find_copies(folder, plan, run_shards)
    shards = range(plan.num_shards)
    left = [shard for shard in shards if not is_written(folder, plan, shard)]
    run_shards(write_shard, str(folder), plan, left)
    finish(folder, plan)


def _leftovers(folder: epath.Path) -> list[epath.Path]:
    """What a finished preparation does not keep, also of processes that were killed."""
    parts = [*folder.glob("*.part"), *folder.glob("checks/*.part")]
    ours = [p for p in parts if _PART.fullmatch(p.relative_to(folder).as_posix())]
    return [*task_files(folder), *ours]


def _is_of_listing(path: epath.Path) -> bool:
    """Whether a start that was killed while listing, before its plan, may have left it.

    All else is somebody's own and must not be touched.
    """
    if path.name == "tasks":
        return path.is_dir() and all(map(is_task_file, path.iterdir()))
    if path.name != "lock":
        return False
    try:
        data = foreign_files.read_file(path, _MAX_LOCK)
        holder = foreign_files.parse_json(data or b"{}")
    except (OSError, ValueError):
        return False
    # Empty after a start that ended by itself, else it names the process.
    return not data or (isinstance(holder, dict) and {"host", "pid"} <= holder.keys())


def _open_folder(folder: epath.Path, request: Request) -> Plan | None:
    """The plan that an earlier start left, if it is for the same."""
    if request.keep_first is not None and request.keep_list is None:
        raise ConfigError("--keep-first needs the --keep-list that it is the first of")
    if request.min_side < 1:
        raise ConfigError(f"--min-side={request.min_side} must be at least 1 pixel")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out={folder} is a file; name a folder")
    plan = read_plan(folder)
    described = describe(request)
    if plan is not None:
        if is_finished(folder):  # its sources may be gone by now
            described.pop("source_bytes")
        refuse_another(folder, plan, described)
        return plan
    there = folder.iterdir() if folder.exists() else ()
    if others := [path.name for path in there if not _is_of_listing(path)]:
        raise ConfigError(
            f"--out={folder} holds other files, e.g. {min(others)}; name a new folder"
        )
    find_sources(request.source)  # refuses before anything is written
    return None


def _lock(folder: epath.Path) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock.acquire(folder, flag="--out")
    except OSError as error:
        raise ConfigError(
            f"--out={folder} cannot be written: {error.strerror}"
        ) from error


def _make_plan(folder: epath.Path, request: Request, earlier: Plan | None) -> Plan:
    """Lists in a process of its own, which a damaged LMDB may kill."""
    print("listing the sources ...", flush=True)
    with reporting_failure(str(folder)), worker_pool(1) as pool:
        try:
            return pool.submit(make_plan, folder, request, earlier).result()
        except BrokenProcessPool:
            raise ConfigError(
                f"--source={' '.join(request.source)}: listing it killed the process; "
                "a damaged LMDB does that (copy it again), or too little memory"
            ) from None


def _find_copies(folder: epath.Path, plan: Plan, run_shards: RunShards) -> None:
    """Tells each shard which of its members equal an earlier one of any shard."""
    shards = range(plan.num_shards)
    run_shards(read_digests, str(folder), plan, shards)
    digests = b"".join(read_digests(str(folder), shard) for shard in shards)
    is_copy = find_copies(np.frombuffer(digests, "V16"))
    for shard in shards:
        part = is_copy[shard * plan.shard_size : (shard + 1) * plan.shard_size]
        write_copies(folder, shard, part)
