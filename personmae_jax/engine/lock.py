"""One writer in a folder: flock where there is one, a heartbeat elsewhere."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from absl import logging
from etils import epath

from personmae_jax.engine import storage
from personmae_jax.errors import ConfigError

HEARTBEAT = 30.0  # seconds between two refreshes of a lock without flock
STALE = 180.0  # seconds without a refresh after which its holder counts as dead
WATCH = 5.0  # seconds between two looks at a lock whose holder may be dead
_MAX_SIZE = 4096  # bytes; ours have 200
SETTLE = 3.0  # seconds after which a rival's simultaneous write has become visible


def acquire(folder: epath.Path, flag: str = "--workdir") -> "FileLock | HeartbeatLock":
    """Locks the folder, which `flag` names, for this process.

    Raises:
      ConfigError: Another process holds it; the message names host and process.
    """
    where = f"{flag}={folder}"
    if not storage.is_remote(folder):
        try:
            return FileLock(folder, where)
        except OSError as e:  # some network file systems have no flock
            if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
    return HeartbeatLock(folder, where)


def holder(folder: epath.Path) -> dict[str, Any]:
    """The process that has locked the folder, as its file says; {} if none has."""
    try:
        said = _parse(storage.read_whole(folder / "lock", _MAX_SIZE))
    except OSError:
        return {}
    return {name: said.get(name) for name in ("host", "pid", "boot")}


class FileLock:
    """flock on FOLDER/lock; the kernel releases it when this process ends.

    Python opens files close-on-exec, so spawned workers do not hold it on.
    """

    def __init__(self, folder: epath.Path, where: str):
        self._file = folder / "lock"
        self._fd = storage.open_in_place(self._file, os.O_RDWR)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(_identity()).encode(), 0)
            os.fsync(self._fd)  # else NFS shows it to other hosts half a minute later
        except BlockingIOError:
            holder = _parse(os.pread(self._fd, _MAX_SIZE, 0))
            os.close(self._fd)
            raise _refusal(where, holder) from None
        except OSError:
            os.close(self._fd)
            raise

    def is_lost(self) -> bool:
        """Whether the locked file is no longer the one in the folder."""
        try:
            there, here = os.stat(self._file), os.fstat(self._fd)
        except FileNotFoundError:
            return True
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)

    def release(self) -> None:
        # The file stays: if it were removed, two runs could lock two files.
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


class HeartbeatLock:
    """FOLDER/lock, rewritten every `HEARTBEAT` seconds while its holder lives.

    A holder on another host is waited for, until it gives a sign of life or counts as
    dead: so a run that was killed and is started again elsewhere at once goes on.

    Of two runs that start within `SETTLE` seconds the last writer wins, and the
    other one sees that.
    """

    def __init__(self, folder: epath.Path, where: str):
        self._file = folder / "lock"
        self._id = uuid.uuid4().hex
        self._lost = False
        self._stop = threading.Event()
        self._wait_for_holder(where)
        self._write()
        self._stop.wait(SETTLE)
        holder = self._read()
        if holder.get("id") != self._id:
            raise _refusal(where, holder, "it started at the same time")
        self._thread = threading.Thread(
            target=self._refresh, name="workdir-lock", daemon=True
        )
        self._thread.start()

    def _wait_for_holder(self, where: str) -> None:
        """Returns once the lock is free or its holder dead; raises if that is alive."""
        first = holder = self._read()
        rest = min(STALE - _age(holder), STALE)  # its clock may be ahead of ours
        until = time.monotonic() + rest
        while holder and not _is_dead(holder) and time.monotonic() < until:
            if _is_here(holder) or holder != first:
                raise _refusal(where, holder)
            logging.log_first_n(
                logging.WARNING,
                "%s is locked by process %s on %s; waiting up to %.0f s for a sign "
                "that it lives",
                1,
                *(where, holder["pid"], holder.get("host"), rest),
            )
            self._stop.wait(WATCH)
            holder = self._read()

    def is_lost(self) -> bool:
        """Whether another run has taken the lock over."""
        return self._lost

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # else it goes stale by itself
            if self._read().get("id") == self._id:
                self._file.unlink()

    def _refresh(self) -> None:
        while not self._stop.wait(HEARTBEAT) and not self._lost:
            try:
                self._lost = self._read().get("id", self._id) != self._id
                if not self._lost:
                    self._write()
            except Exception as e:  # storage that is away for a moment
                logging.warning("%s could not be refreshed: %s", self._file, e)

    def _read(self) -> dict[str, Any]:
        try:
            return _parse(storage.read_whole(self._file, _MAX_SIZE))
        except FileNotFoundError:
            return {}

    def _write(self) -> None:
        content = _identity() | {"id": self._id, "heartbeat": time.time()}
        storage.write_whole(self._file, json.dumps(content))


def _identity() -> dict[str, Any]:
    """This process; `boot` tells apart machines of one name."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": boot.read_text().strip() if boot.exists() else "",
    }


def _parse(data: bytes) -> dict[str, Any]:
    """The holder that a lock file names; {} for a damaged one, which counts as free."""
    try:
        holder = json.loads(data)
        return {**holder, "pid": int(holder["pid"])}
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}


def _refusal(where: str, holder: dict[str, Any], more: str = "") -> ConfigError:
    return ConfigError(
        f"{where} is in use by process {holder.get('pid', '?')} on "
        f"{holder.get('host', 'an unknown host')}; stop that run or use another "
        f"{where.partition('=')[0]}{f' ({more})' if more else ''}"
    )


def _age(holder: dict[str, Any]) -> float:
    """Seconds since the last heartbeat, by the clocks of both hosts."""
    heartbeat = holder.get("heartbeat")
    return time.time() - heartbeat if isinstance(heartbeat, float) else float("inf")


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is, or was, a process of this machine."""
    mine = _identity()
    return all(holder.get(name) == mine[name] for name in ("host", "boot"))


def _is_dead(holder: dict[str, Any]) -> bool:
    if _age(holder) > STALE:
        return True
    # A restarted container often gives its process the number of the one before.
    return _is_here(holder) and (
        holder["pid"] == os.getpid() or not _lives(holder["pid"])
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
