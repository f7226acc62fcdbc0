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
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree, UInt8
from PIL import Image

from personmae_jax.engine.storage import is_remote
from personmae_jax.errors import Closing, RunError, first_line
from personmae_jax.trees import named_leaves

_COPY_EVERY = 30.0  # seconds between two copies to object storage, at least
_COPY_SHARE = 0.05  # of the time at most goes into copying
_FLUSH_EVERY = 10  # seconds between two writes of TensorBoard events
_BLOCK = 1 << 16  # bytes read at once from the end of metrics.jsonl
_MAX_ROW = 1 << 20  # bytes; a longer line is garbage


class MetricsWriter(Closing):
    """Writes WORKDIR/metrics.jsonl, tensorboard/ and pictures/; a context manager.

    On object storage, which cannot append, the growing files live in a temporary
    folder of this machine and are copied whole, at most every 30 s and at the end.
    """

    def __init__(self, workdir: epath.Path, start_step: int):
        """Opens the files of the run and cuts off what comes after `start_step`.

        Args:
          workdir: Of a run that holds its lock.
          start_step: The restored step, 0 for a new run: it has no rows yet, not even
            of step 0, the untrained network.
        """
        self._workdir = workdir
        self._remote = is_remote(workdir)
        self._closing = contextlib.ExitStack()
        with self._report_failure():
            self._open(start_step)

    def _open(self, start_step: int) -> None:
        workdir = self._workdir
        if self._remote:
            temporary = tempfile.TemporaryDirectory(prefix="metrics-")
            self._local = pathlib.Path(self._closing.enter_context(temporary))
            if (workdir / "metrics.jsonl").exists():
                rows = (workdir / "metrics.jsonl").read_bytes()
                (self._local / "metrics.jsonl").write_bytes(rows)
        else:
            self._local = pathlib.Path(workdir)
        self._rows = io.FileIO(self._local / "metrics.jsonl", "a+")  # not buffered
        self._closing.enter_context(self._rows)
        # A run that starts at 0 has its row of step 0 still to come, if it has one.
        last_row = start_step or -1
        self._rows.truncate(_end_of_rows(self._rows, last_row))
        self._tensorboard = tensorboardX.SummaryWriter(
            str(self._local / "tensorboard"),
            # Hides what a run that was killed has logged after `start_step`: else the
            # curves would double.
            purge_step=last_row + 1,
            flush_secs=_FLUSH_EVERY,
            filename_suffix=f".{time.time_ns()}",  # two starts in the same second
        )
        self._closing.callback(self._tensorboard.close)
        self._next_copy = time.monotonic() + _COPY_EVERY

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row; on a local disk it is there when this returns.

        Args:
          step: The step whose very values these are, no means over steps.
          values: Numbers, 0-d arrays and strings. Not-a-number and infinities, which
            JSON does not know, become null.

        Raises:
          RunError: The disk is full.
        """
        row = {"step": step} | {name: _to_json(v) for name, v in values.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._report_failure():
            rest = line.encode()
            while rest:  # a disk that fills takes a part, and the next write says why
                rest = rest[self._rows.write(rest) :]
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(name, value, step)
            if self._remote and time.monotonic() >= self._next_copy:
                self.flush()

    def write_picture(self, step: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes WORKDIR/pictures/STEP.png and shows the same in TensorBoard.

        Raises:
          RunError: The disk is full.
        """
        png = io.BytesIO()
        Image.fromarray(picture).save(png, format="png")
        with self._report_failure():
            folder = self._workdir / "pictures"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{step}.png").write_bytes(png.getvalue())
            self._tensorboard.add_image("picture", picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Copies to object storage what is not there yet; call it before a checkpoint.

        A copy that fails is said in the log and made up for by the next one.
        """
        self._tensorboard.flush()
        if not self._remote:
            return
        start = time.monotonic()
        try:
            self._copy()
        except Exception as e:  # each storage has its own errors
            logging.warning("Metrics not copied to %s: %s", self._workdir, e)
        duration = time.monotonic() - start
        self._next_copy = start + max(_COPY_EVERY, duration / _COPY_SHARE)

    def close(self) -> None:
        """Writes out what is left; raises RunError if storage does not take it."""
        with self._closing, self._report_failure():
            self._tensorboard.close()
            if self._remote:
                self._copy()

    def _copy(self) -> None:
        for file in self._local.rglob("*"):
            if file.is_file():
                target = self._workdir / file.relative_to(self._local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

    @contextlib.contextmanager
    def _report_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise RunError(
                f"metrics cannot be written to {self._workdir} ({first_line(e)}); "
                "fix that and start again"
            ) from e


def _to_json(value: Any) -> int | float | str | None:
    if isinstance(value, str | int):
        return value
    number = np.asarray(value).item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _end_of_rows(file: io.FileIO, last_step: int) -> int:
    """Bytes up to and including the last row whose step is at most `last_step`.

    Reads from the end, as far as rows are to be cut off.
    """
    end = file.seek(0, os.SEEK_END)
    end = _find_newline(file, end) + 1  # what follows the last newline is torn
    while end:
        start = _find_newline(file, end - 1) + 1
        file.seek(start)
        row = file.read(end - start) if end - start <= _MAX_ROW else b""
        if 0 <= _step_of(row) <= last_step:
            break
        end = start
    return end


def _find_newline(file: io.FileIO, end: int) -> int:
    """Position of the last newline before `end`; -1 if there is none."""
    while end > 0:
        start = max(end - _BLOCK, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found
        end = start
    return -1


def _step_of(row: bytes) -> int:
    """Step of a row; -1 if it is none."""
    try:
        step = json.loads(row)["step"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return -1
    return step if type(step) is int else -1


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
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
