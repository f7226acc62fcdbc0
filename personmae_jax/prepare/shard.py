"""One shard of a preparation: its members verified, converted, written, checksummed.

The same function runs in a local process and in a Beam worker: it needs the folder
and the shard's number, and leaves `persons-train.array_record-*` and
`checks/NNNNN.npz`. The shard's file is renamed to its name last of all.
"""

import errno
import functools
import os
import re
import threading
import zlib
from typing import Any

import cv2
import numpy as np
from array_record.python import array_record_module  # type: ignore[attr-defined]
from etils import epath
from jaxtyping import UInt8

from personmae_jax.config import DataConfig
from personmae_jax.data.images import BadImage, Outcome, decode
from personmae_jax.data.names import printable
from personmae_jax.data.records import MAX_BYTES
from personmae_jax.engine import pictures
from personmae_jax.engine.storage import appearing_whole
from personmae_jax.errors import ConfigError, RunError, first_line
from personmae_jax.prepare import manifest
from personmae_jax.prepare.listing import MemberError
from personmae_jax.prepare.lmdb_source import video_of
from personmae_jax.prepare.plan import Plan, read_plan
from personmae_jax.prepare.sources import open_reader
from personmae_jax.prepare.task import Task, read_task

DATASET = "persons"
FEATURES = ("image", "name", "identity", "camera", "video")
MAX_PIXELS = DataConfig().max_pixels
# Each record on its own, so that a random read touches nothing else; a JPEG's bytes
# are not compressed again (it saves nothing and takes 20 us).
_WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
_READING = threading.Lock()  # a reader seeks; Beam's workers may be threads


def shard_file(folder: epath.Path, shard: int, num_shards: int) -> epath.Path:
    """Where tfds expects shard number `shard`."""
    return folder / f"{DATASET}-train.array_record-{shard:05}-of-{num_shards:05}"


def is_written(folder: epath.Path, plan: Plan, shard: int) -> bool:
    """Whether a shard and what is noted of it are there."""
    try:
        manifest.read_checks(folder, shard, plan.num_rows(shard))
    except RunError:
        return False
    return shard_file(folder, shard, plan.num_shards).exists()


def write_shard(folder: str, shard: int) -> None:
    """Writes one shard and its checks, unless it is there.

    Raises:
      RunError: Nothing more can be written, or a source is gone.
    """
    path, plan = epath.Path(folder), plan_in(folder)
    if is_written(path, plan, shard):
        return
    task = read_task(path, shard)
    file = shard_file(path, shard, plan.num_shards)
    copies = np.zeros(len(task.names), bool)
    if plan.request["drop_duplicates"]:
        copies = np.load(path / "tasks" / f"{shard:05}.copies.npy")
    try:
        with appearing_whole(file, is_shared=True) as part:
            checks = _write_records(part, plan, task, copies)
            manifest.write_checks(path, shard, checks)
    except RunError:
        raise
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"{file} cannot be written ({first_line(error)}); the shards finished so "
            "far are good: fix the cause and start again with the same command"
        ) from error


def _write_records(
    part: epath.Path, plan: Plan, task: Task, copies: np.ndarray
) -> manifest.Checks:
    writer = array_record_module.ArrayRecordWriter(os.fspath(part), _WRITER_OPTIONS)
    rows = np.zeros(len(task.names), manifest.ROW)
    sums, rejected, num_bytes = np.zeros((2, 3), np.uint64), [], 0
    min_side = plan.request["min_side"]
    for number, name in enumerate(task.names):
        row = rows[number]
        try:
            data = _read_member(plan, task, number)
            row["digest"] = manifest.digest(data)
            stored, pixels, outcome = _verify(data, min_side)
            row["height"], row["width"], _ = pixels.shape
            row["outcome"] = outcome
            if copies[number]:
                row["state"] = manifest.DUPLICATE
                rejected.append((printable(name), "an exact copy of an earlier one"))
                continue
        except (BadImage, MemberError) as error:
            row["state"] = manifest.REJECTED
            row["outcome"] = getattr(error, "outcome", Outcome.UNREADABLE)
            rejected.append((printable(name), _reason(error, min_side)))
            continue
        is_stored = stored is data
        row["state"] = manifest.STORED if is_stored else manifest.CONVERTED
        record = _serialise(stored, task, number)
        row["checksum"] = zlib.crc32(record)
        num_bytes += len(record)
        sums += _pixel_sums(pixels)
        writer.write(record)
    writer.close()
    with open(part, "rb") as file:
        os.fsync(file.fileno())
        file_digest = manifest.digest_file(file)
    return manifest.Checks(rows, rejected, sums, num_bytes, file_digest)


def read_digests(folder: str, shard: int) -> bytes:
    """Digests of the members' bytes end to end, 16 bytes each, before any is written.

    Those that cannot be read have `manifest.NO_DIGEST`. Kept in the folder for the next
    start.
    """
    path = epath.Path(folder) / "tasks" / f"{shard:05}.digests"
    plan, digests = plan_in(folder), bytearray()
    if path.exists():
        digests += path.read_bytes()
    # A power cut or a full disk may have left a piece.
    if len(digests) != plan.num_rows(shard) * len(manifest.NO_DIGEST):
        digests.clear()
        task = read_task(epath.Path(folder), shard)
        for number in range(len(task.names)):
            try:
                digests += manifest.digest(_read_member(plan, task, number))
            except MemberError:
                digests += manifest.NO_DIGEST
        with appearing_whole(path, is_shared=True) as part:
            part.write_bytes(bytes(digests))
    return bytes(digests)


def write_copies(folder: epath.Path, shard: int, is_copy: np.ndarray) -> None:
    """Tells `write_shard` which members are copies of earlier ones."""
    np.save(folder / "tasks" / f"{shard:05}.copies.npy", is_copy)


@functools.cache
def plan_in(folder: str) -> Plan:
    """The plan in a folder that has one, read once for this process."""
    plan = read_plan(epath.Path(folder))
    if plan is None:
        raise RunError(f"{folder} holds no plan; start again")
    return plan


# A member's own: it was taken away, may not be read, or is no file. Whatever else the
# system says is of the disk, the network or this process: the next would fail, too.
_OF_A_MEMBER = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR)
_OF_A_MEMBER += (errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG, errno.EINVAL, None)


def _read_member(plan: Plan, task: Task, number: int) -> bytes:
    kind, paths = plan.sources[task.sources[number]]
    with _READING:
        try:
            reader = open_reader(kind, paths)
        except (OSError, ConfigError) as error:
            raise _gone(paths[0], error) from error
        try:
            return reader(task.names[number], task.places[number], MAX_BYTES)
        except OSError as error:
            # An unmounted disk leaves an empty folder.
            is_there = kind != "folder" or _has_entries(paths[0])
            if error.errno in _OF_A_MEMBER and is_there:
                raise MemberError(error.strerror or "cannot be read") from error
            raise _gone(paths[0], error) from error


def _gone(path: str, error: Exception) -> RunError:
    return RunError(
        f"{path} cannot be read any more ({first_line(error)}); bring it back and "
        "start again with the same command"
    )


def _has_entries(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _verify(
    data: bytes, min_side: int
) -> tuple[bytes, UInt8[np.ndarray, "h w 3"], Outcome]:
    """What is stored of a file, its pixels, and what had to be converted.

    The bytes themselves are stored of a colour JPEG; every other image becomes a PNG
    of the pixels that training would see.
    """
    pixels, outcome = decode(data, max_pixels=MAX_PIXELS, min_side=min_side)
    if outcome == Outcome.PLAIN and data.startswith(b"\xff\xd8\xff"):
        return data, pixels, outcome
    return pictures.encode(pixels), pixels, outcome


def _reason(error: Exception, min_side: int) -> str:
    outcome = getattr(error, "outcome", None)
    if outcome == Outcome.TOO_SMALL:
        return f"a side under --min-side={min_side}"
    if outcome == Outcome.TOO_LARGE:
        return f"more than {MAX_PIXELS} pixels"
    return str(error)


# Market-1501 and its kin: 0002_c1s1_000451_03.jpg; -1 stands for a distractor.
_MARKET = re.compile(rb"(-?\d+)_c(\d+)[^/]*")


def _labels(task: Task, number: int) -> tuple[bytes, bytes, bytes]:
    """Identity, camera and video of a member, each empty where nothing tells it."""
    name = task.names[number].rpartition(b"/")[2]
    market = _MARKET.fullmatch(name)
    identity, camera = market.groups() if market else (b"", b"")
    return (
        task.identities[number] or identity,
        camera,
        task.videos[number] or video_of(name),
    )


def _serialise(image: bytes, task: Task, number: int) -> bytes:
    """A tf.train.Example of the features, as tfds writes it; no TensorFlow."""
    from tensorflow_datasets.proto import tf_example_pb2  # 1 s, so only when used

    messages: Any = tf_example_pb2  # made at run time
    example = messages.Example()
    name = printable(task.names[number]).encode()
    values = (image, name, *_labels(task, number))
    for feature, value in zip(FEATURES, values, strict=True):
        example.features.feature[feature].bytes_list.value.append(value)
    return example.SerializeToString(deterministic=True)


def _pixel_sums(pixels: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
    """(sums, sums of squares) by channel; whole numbers, so the order does not show."""
    mean, std = (x[:, 0] for x in cv2.meanStdDev(pixels))
    count = pixels.shape[0] * pixels.shape[1]
    sums = np.stack([mean * count, (std**2 + mean**2) * count])
    return np.rint(sums).astype(np.uint64)
