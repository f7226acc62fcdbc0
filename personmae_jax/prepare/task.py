"""The folder `DIR/tasks`: the members of each shard, and what is noted beside them."""

import contextlib
import dataclasses
import os
import re

import numpy as np
from etils import epath
from jaxtyping import Int64

from personmae_jax.data.names import Names
from personmae_jax.prepare.manifest import open_arrays, write_arrays

_TASKS = "tasks"
# What this package puts there, with the parts of what was not finished.
_TASK_FILE = re.compile(
    r"\d{5,}\.(npz|digests|copies\.npy)(\.[0-9a-f]{32})?(\.part)?", re.ASCII
)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The members of one shard, in order; texts are empty where a source has none."""

    names: Names  # in the source
    sources: Int64[np.ndarray, " n"]  # which of the plan's
    places: Int64[np.ndarray, "n columns"]  # there; padded to the widest source's
    identities: Names
    videos: Names


def write_task(folder: epath.Path, shard: int, task: Task) -> None:
    """Writes the members of shard number `shard`."""
    arrays = {"sources": task.sources, "places": task.places}
    for column in ("names", "identities", "videos"):
        names = getattr(task, column)
        arrays |= {column: names.text, f"{column}_ends": names.ends}
    write_arrays(_task_file(folder, shard), **arrays)


def read_task(folder: epath.Path, shard: int) -> Task:
    """The members of shard number `shard`.

    Raises:
      RunError: Its file is missing or damaged.
    """
    way_out = "start again with the same command, which lists the sources anew"
    with open_arrays(_task_file(folder, shard), way_out) as arrays:
        columns = [
            Names(arrays[column], arrays[f"{column}_ends"])
            for column in ("names", "identities", "videos")
        ]
        return Task(columns[0], arrays["sources"], arrays["places"], *columns[1:])


def is_task_file(file: epath.Path) -> bool:
    """Whether a file in the folder of tasks is named like one of ours."""
    return _TASK_FILE.fullmatch(file.name) is not None


def task_files(folder: epath.Path) -> list[epath.Path]:
    """The tasks and what was noted beside them, but for files of others."""
    tasks = folder / _TASKS
    return [*filter(is_task_file, tasks.iterdir())] if tasks.is_dir() else []


def remove_tasks(folder: epath.Path) -> None:
    """Frees what a finished preparation no longer needs; files of others stay."""
    for file in task_files(folder):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is gone, or holds files of others
        os.rmdir(folder / _TASKS)


def _task_file(folder: epath.Path, shard: int) -> epath.Path:
    return folder / _TASKS / f"{shard:05}.npz"
