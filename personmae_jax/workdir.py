"""The folder of one run: who may write there, and with which settings."""

import importlib.util
import os
from typing import Any

import fsspec.config
from etils import epath

from personmae_jax import lock
from personmae_jax.config import Config
from personmae_jax.config_json import (
    config_from_json,
    config_to_json,
    differences,
    parse_object,
)
from personmae_jax.errors import ConfigError, RunError, first_line

# What a later start may change: these settings do not change what is computed.
# A name that ends in a dot stands for all fields below it.
FREE_FIELDS = (
    "config.data.path",
    "config.data.num_threads",
    "config.data.num_workers",
    "config.data.max_bad_fraction",
    "config.train.accumulate",
    "config.checkpoint.",
    "config.log.",
)

_MAX_CONFIG = 1 << 20  # bytes; ours has 3,000


class Workdir:
    """Context manager: locks the folder, then compares or writes `config.json`.

    In a run of several processes only process 0 enters it. `path` is the folder,
    as an etils path, local or `gs://`.

    Raises (on entering):
      ConfigError: The folder cannot be written, another run holds it, or it belongs
        to a run with other settings.
    """

    def __init__(self, path: os.PathLike[str] | str, cfg: Config):
        self.path = open_path(path)
        self._cfg = cfg
        self._lock: lock.FileLock | lock.HeartbeatLock | None = None

    def __enter__(self) -> "Workdir":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.acquire(self.path)
            self._settle_config()
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
        """Raises RunError if another run has taken the folder over meanwhile."""
        if self._lock is not None and self._lock.is_lost():
            raise RunError(
                f"another run has taken over --workdir={self.path}, because this one "
                f"had not been heard of for {lock.STALE:.0f} s; go on with that one"
            )

    def _settle_config(self) -> None:
        new = config_to_json(self._cfg)
        file = self.path / "config.json"
        if file.exists():
            text = _read_config_text(self.path)
            if text == new:
                return
            found = differences(_parse(file, text), parse_object(new))
            wrong = [
                f"{name}: {values}"
                for name, values in found.items()
                if not any(_is_below(name, free) for free in FREE_FIELDS)
            ]
            if wrong:
                raise ConfigError(
                    f"--workdir={self.path} belongs to a run with other settings "
                    f"({'; '.join(wrong)}); give the same settings or another "
                    "--workdir"
                )
        lock.write_whole(file, new)


def open_path(path: os.PathLike[str] | str) -> epath.Path:
    """The etils path of a workdir.

    Raises:
      ConfigError: Neither local nor `gs://`, or what `gs://` needs is not installed.
    """
    scheme, found, _ = os.fspath(path).partition("://")
    if not found:
        return epath.Path(path).expanduser().absolute()
    if scheme != "gs":
        raise ConfigError(
            f"--workdir={os.fspath(path)} is on {scheme}://; it may be a local path "
            "or gs://BUCKET/FOLDER"
        )
    # etils takes TensorFlow for gs:// where that is installed.
    if not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
        raise ConfigError(
            f"--workdir={os.fspath(path)} needs gcsfs; "
            "pip install -r requirements-gcs.txt"
        )
    # gcsfs would go on listing what it once saw, while tensorstore and other hosts
    # write beside it.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(path)


def read_config(path: os.PathLike[str] | str) -> Config:
    """The settings of the run in the workdir `path`; creates nothing.

    Raises:
      ConfigError: No run is there, or its `config.json` is damaged or of another
        version.
    """
    folder = open_path(path)
    file = folder / "config.json"
    if not file.exists():
        raise ConfigError(f"{folder} holds no run: it has no config.json")
    text = _read_config_text(folder)
    try:
        return config_from_json(text)
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from e


def _read_config_text(folder: epath.Path) -> str:
    file = folder / "config.json"
    try:
        with file.open("rb") as f:
            data = f.read(_MAX_CONFIG + 1)
        if len(data) > _MAX_CONFIG:
            raise ValueError(f"it is larger than {_MAX_CONFIG} bytes")
        return data.decode()
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"{file} cannot be read ({first_line(e)}); restore it or use another "
            "--workdir"
        ) from e


def _parse(file: epath.Path, text: str) -> dict[str, Any]:
    try:
        return parse_object(text)
    except ConfigError as e:
        raise ConfigError(
            f"{file} is damaged ({e}); restore it or use another --workdir"
        ) from e


def _is_below(name: str, free: str) -> bool:
    return name.startswith(free) if free.endswith(".") else name == free
