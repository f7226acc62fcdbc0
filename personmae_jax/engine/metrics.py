"""What a run reports: metrics.jsonl, TensorBoard and pictures."""

import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import PyTree, UInt8
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from personmae_jax import sharding
from personmae_jax.engine import pictures
from personmae_jax.engine.storage import (
    copy_folder,
    is_remote,
    open_in_place,
    read_whole,
    reporting_failure,
    write_whole,
)
from personmae_jax.engine.trees import named_leaves
from personmae_jax.errors import Closing

_proto: Any = event_pb2  # its classes are made when it is imported
_Summary: Any = summary_pb2.Summary  # type: ignore[attr-defined]
_COPY_EVERY = 30.0  # seconds between two copies to object storage, at least
_COPY_SHARE = 0.05  # of the time at most goes into copying
_FLUSH_EVERY = 10  # seconds between two writes of TensorBoard events
_FILE = "metrics.jsonl"
_MAX_SIZE = 1 << 30  # bytes of that file; a row of 500 every step for 2 million steps


class MetricsWriter(Closing):
    """Writes WORKDIR/metrics.jsonl, tensorboard/ and pictures/; a context manager.

    On object storage, which cannot append, the growing files live in a temporary
    folder of this machine and are copied whole, at most every 30 s and at the end.
    """

    def __init__(self, workdir: epath.Path, start_step: int):
        """Opens the files of the run and cuts off what comes after `start_step`."""
        super().__init__()
        self._workdir = workdir
        self._remote = is_remote(workdir)
        with self._reporting_failure():
            if self._remote:
                temporary = tempfile.TemporaryDirectory(prefix="metrics-")
                self._local = pathlib.Path(self._closing.enter_context(temporary))
            else:
                self._local = pathlib.Path(workdir)
            # A run that starts at 0 has its row of step 0 still to come, if it has one.
            last_row = start_step or -1
            rows = _rows_until(workdir, last_row)
            if rows or not self._remote:
                write_whole(epath.Path(self._local / _FILE), rows)
            descriptor = open_in_place(self._local / _FILE, os.O_WRONLY | os.O_APPEND)
            self._rows = io.FileIO(descriptor, "a")  # not buffered
            self._closing.enter_context(self._rows)
            folder = self._local / "tensorboard"
            folder.mkdir(parents=True, exist_ok=True)
            # Not SummaryWriter: the thread that it writes by dies of a full disk, and
            # the run then waits for it for ever.
            self._events = EventsWriter(
                str(folder / "events"),
                filename_suffix=f".{time.time_ns()}",  # two starts in the same second
            )
            # Hides what a run that was killed has logged after `start_step`: else the
            # curves would double.
            started = _proto.SessionLog(status=1)  # START
            self._write_event(last_row + 1, session_log=started)
            self._next_copy = time.monotonic() + _COPY_EVERY
            self._next_flush = 0.0

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row; on a local disk it is there when this returns.

        The values are numbers, 0-d arrays and strings of that very step, no means over
        steps. Not-a-number and infinities, which JSON does not know, become null.

        Raises:
          RunError: The disk is full.
        """
        row = {"step": step} | {name: _to_json(v) for name, v in values.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._reporting_failure():
            rest = line.encode()
            while rest:  # a disk that fills takes a part, and the next write says why
                rest = rest[self._rows.write(rest) :]
            scalars = [
                _Summary.Value(tag=name, simple_value=value)
                for name, value in row.items()
                if name != "step" and isinstance(value, int | float)
            ]
            self._write_event(step, summary=_Summary(value=scalars))
            if time.monotonic() >= self._next_flush:
                self._events.flush()
                self._next_flush = time.monotonic() + _FLUSH_EVERY
            if self._remote and time.monotonic() >= self._next_copy:
                self.flush()

    def _write_event(self, step: int, **content: Any) -> None:
        event = _proto.Event(wall_time=time.time(), step=step, **content)
        self._events.write_event(event)

    def write_picture(self, step: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes WORKDIR/pictures/STEP.png; on a local disk TensorBoard has it, too.

        Raises:
          RunError: The disk is full.
        """
        png = pictures.encode(picture)
        with self._reporting_failure():
            pictures.write(self._workdir, f"{step}.png", png)
            if self._remote:
                return  # each copy of the events would hold all pictures again
            height, width, _ = picture.shape
            image = _Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=png
            )
            value = _Summary.Value(tag="picture", image=image)
            self._write_event(step, summary=_Summary(value=[value]))

    def flush(self) -> None:
        """Copies to object storage what is not there yet; call it before a checkpoint.

        A copy that fails is said in the log and made up for by the next one.
        """
        with self._reporting_failure():
            self._events.flush()
        if not self._remote:
            return
        start = time.monotonic()
        try:
            copy_folder(self._local, self._workdir)
        except Exception as e:  # each storage has its own errors
            logging.warning("Metrics not copied to %s: %s", self._workdir, e)
        duration = time.monotonic() - start
        self._next_copy = start + max(_COPY_EVERY, duration / _COPY_SHARE)

    def close(self) -> None:
        """Writes out what is left; raises RunError if storage does not take it."""
        with self._reporting_failure(), self._closing:
            self._events.close()
            if self._remote:
                copy_folder(self._local, self._workdir)

    def _reporting_failure(self) -> contextlib.AbstractContextManager[None]:
        return reporting_failure(f"the metrics in {self._workdir}")


def _to_json(value: Any) -> int | float | str | None:
    if isinstance(value, str | int):
        return value
    number = np.asarray(value).item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def read_rows(workdir: epath.Path) -> list[dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl; lines that are none, torn ones too, are not.

    Raises:
      OSError: It cannot be read.
    """
    return [row for line in _read_lines(workdir) if (row := _parse_row(line))]


def _rows_until(workdir: epath.Path, last_step: int) -> bytes:
    """The lines of WORKDIR/metrics.jsonl whose steps are at most `last_step`."""
    # What follows the last newline is torn, even if it happens to be JSON.
    lines = _read_lines(workdir)[:-1]
    kept = [x for x in lines if (row := _parse_row(x)) and row["step"] <= last_step]
    return b"".join(line + b"\n" for line in kept)


def _read_lines(workdir: epath.Path) -> list[bytes]:
    file = workdir / _FILE
    return read_whole(file, _MAX_SIZE).split(b"\n") if file.exists() else []


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """The numbers of the row in a line; None if it is none."""
    try:
        row = json.loads(line)
        row = {k: v for k, v in row.items() if v is None or type(v) in (int, float)}
        return row if type(row["step"]) is int and row["step"] >= 0 else None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def params_sha256(params: PyTree) -> str:
    """Returns the SHA-256 of all parameters in hex, equal for any sharding.

    Hashed leaf by leaf in the order of their paths: path, dtype, shape, bytes (C
    order, this machine's byte order). Every process of a run must call it.
    """
    digest = hashlib.sha256()
    leaves = named_leaves(params)
    for name in sorted(leaves):
        array = _to_host(leaves[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _to_host(leaf: Any) -> np.ndarray:
    is_here = not isinstance(leaf, jax.Array) or (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )
    if is_here:
        return np.asarray(jax.device_get(leaf))
    return sharding.gather_processes(leaf, is_split=True)
