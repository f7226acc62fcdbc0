"""Opens PyTorch and safetensors files of strangers; runs nothing that is in them."""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # makes "bfloat16" a name that numpy knows
import numpy as np
from jaxtyping import Float32
from safetensors import safe_open

from personmae_jax import foreign_files
from personmae_jax.errors import ConfigError, first_line

_FLOATS = ("float16", "bfloat16", "float32", "float64")
# Of a folder of Hugging Face's, the first that is there.
_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_SAFETENSORS_NAMES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, which is read when `array` is called.

    Attributes:
      shape: As the file says; nothing of that size is allocated before `array`.
      dtype: Its name, as numpy's or as the file has it.
      read: Returns what `array` converts.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def array(self) -> Float32[np.ndarray, "..."]:
        """Returns a contiguous float32 copy with its own memory.

        Raises:
          ValueError: It is not of a float type, is not a plain tensor, claims more
            elements than are stored, or holds NaN or infinity.
        """
        if self.dtype not in _FLOATS:
            raise ValueError(f"of type {self.dtype}; it must be one of {_FLOATS}")
        try:
            values = self.read()
            with np.errstate(over="ignore"):  # of float64: found below
                array = np.array(values, np.float32, order="C")
        except ValueError:
            raise
        except Exception as e:  # torch and safetensors raise whatever they meet
            raise ValueError(f"unreadable ({first_line(e)})") from e
        if not np.isfinite(array).all():
            count = array.size - np.isfinite(array).sum()
            raise ValueError(f"not finite in {count} of {array.size} places")
        return array


class Opened(NamedTuple):
    """What a file holds.

    Attributes:
      tree: Nested dicts with `Stored` leaves and whatever else the file has.
      metadata: Of a safetensors file; empty for PyTorch's.
    """

    tree: dict[Any, Any]
    metadata: dict[str, str]


def open_file(path: os.PathLike[str] | str) -> Opened:
    """Returns what a .pth, .pt or .safetensors file holds, whatever its ending.

    PyTorch's files are read with `weights_only=True`: of Python objects only plain
    values, `argparse.Namespace` (an inert holder of attributes, in the files of MAE,
    DeiT and DINO) and numpy's scalars (learning rates in those of DINO) are made.

    Raises:
      ConfigError: One sentence on a file that is missing, damaged, of another kind,
        needs code to be run, or needs a library that is not installed.
    """
    file = _find(os.fspath(path))
    if file.name.endswith(".index.json"):
        return _open_shards(file)
    try:
        with file.open("rb") as f:
            head = f.read(16)
    except FileNotFoundError as e:
        raise ConfigError(f"{_name(path)}: there is no such file") from e
    except OSError as e:
        raise ConfigError(f"{_name(path)} cannot be read ({first_line(e)})") from e
    if head[8:9] == b"{":
        return _open_safetensors(file)
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return Opened(_open_torch(file, is_zip=head.startswith(b"PK")), {})
    if head[:1] == b"\x80" and head[1:2] in (b"\x03", b"\x04", b"\x05"):
        raise _of_protocol(file, head[1])
    kind = "is empty" if not head else "is neither a PyTorch nor a safetensors file"
    raise ConfigError(
        f"{_name(path)} {kind}; name the weights that torch.save or safetensors wrote"
    )


def _name(path: os.PathLike[str] | str) -> str:
    return f"config.init.torch_weights={os.fspath(path)}"


def _find(path: str) -> Path:
    if "://" in path:
        raise ConfigError(
            f"{_name(path)} is not a local file; copy it to a disk of every host"
        )
    file = Path(path).expanduser()
    if os.path.isdir(file):  # Path's own raises where a folder may not be entered
        for name in _FILES:
            if (file / name).is_file():
                return file / name
        raise ConfigError(
            f"{_name(path)} is a folder; name a file, e.g. {file / 'FILE.pth'}"
        )
    return file


def _open_shards(file: Path) -> Opened:
    """All files that Hugging Face's index of a model in parts names."""
    try:
        names = foreign_files.read_json(file)["weight_map"].values()
        names = sorted(set(names))
        if any(name in (file.name, "") or Path(name).name != name for name in names):
            raise ValueError("of files that are not beside it")
    except OSError as e:
        raise ConfigError(f"{_name(file)} cannot be read ({e.strerror})") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ConfigError(f"{_name(file)} is no index of a model in parts") from e
    tree: dict[Any, Any] = {}
    for name in names:
        tree |= open_file(file.parent / name).tree
    return Opened(tree, {})


def _damaged(file: Path, reason: str) -> ConfigError:
    lines = reason.strip().splitlines() or ["unexpected end"]
    return ConfigError(
        f"{_name(file)} cannot be read ({lines[0]}); it is damaged, cut short or of "
        "another kind: fetch it again"
    )


def _open_safetensors(file: Path) -> Opened:
    try:
        opened = safe_open(file, framework="numpy")
        tree = {}
        for name in opened.keys():  # it is no dict
            part = opened.get_slice(name)
            kind = str(part.get_dtype())
            tree[name] = Stored(
                shape=tuple(part.get_shape()),
                dtype=_SAFETENSORS_NAMES.get(kind, kind),
                read=lambda name=name: opened.get_tensor(name),
            )
        return Opened(tree, opened.metadata() or {})
    except Exception as e:  # safetensors raises whatever it meets
        raise _damaged(file, str(e)) from e


def _open_torch(file: Path, *, is_zip: bool) -> dict[Any, Any]:
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"{_name(file)} needs torch; pip install -r requirements-torch.txt"
        )
    import torch

    try:
        if is_zip:
            _refuse_packed(file)
            _refuse_other_zips(file)
        with torch.serialization.safe_globals(_inert_globals()):
            # Mapped, only what is used is read, and no tensor reaches past the file;
            # what torch before 1.6 wrote cannot be mapped.
            tree = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except ConfigError:
        raise
    except Exception as e:  # torch raises whatever it meets
        needed = re.search(r"GLOBAL ([\w.]+)", str(e))
        if needed:
            raise ConfigError(
                f"{_name(file)} holds Python objects ({needed[1]}) that could run "
                "code; only tensors and plain values are read: if you trust the file, "
                "load it yourself and save its tensors alone with torch.save"
            ) from e
        # Torch's own first line is the advice to read the file unsafely.
        raise _damaged(file, str(e).rpartition("WeightsUnpickler error: ")[2]) from e
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{_name(file)} holds a {type(tree).__name__}, not a dict of named tensors"
        )
    return _wrap(tree, torch.Tensor)


def _inert_globals() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]  # named differently by numpy 1 and 2
    return [
        argparse.Namespace,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "bool")),
    ]


def _refuse_packed(file: Path) -> None:
    """Raises ValueError where unpacking would take more room than the file has."""
    with contextlib.closing(zipfile.ZipFile(file)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > file.stat().st_size:
        raise ValueError("its parts are compressed, which torch.save never does")


def _refuse_other_zips(file: Path) -> None:
    """Raises ConfigError for a whole zip that torch.load does not read."""
    with contextlib.closing(zipfile.ZipFile(file)) as archive:
        names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            raise ConfigError(
                f"{_name(file)} is an .npz file of numpy; save its arrays with "
                "safetensors.numpy.save_file(dict(numpy.load(FILE)), NEW)"
            )
        for name in names:
            if name.endswith("/data.pkl"):
                with archive.open(name) as part:
                    head = part.read(2)
                if head[:1] == b"\x80" and head[1:] in (b"\x03", b"\x04", b"\x05"):
                    raise _of_protocol(file, head[1])


def _of_protocol(file: Path, protocol: int) -> ConfigError:
    """Torch's restricted unpickler reads protocol 2 alone."""
    return ConfigError(
        f"{_name(file)} is a pickle of protocol {protocol}, which torch reads only "
        "where it may run code; if you trust the file, load it yourself and save its "
        "tensors with torch.save, which writes protocol 2"
    )


def _wrap(tree: dict[Any, Any], tensor_type: type) -> dict[Any, Any]:
    """The same nested dicts with `Stored` in the place of tensors."""
    wrapped: dict[int, dict[Any, Any]] = {}  # a dict may be shared, or hold itself

    def wrap(value: Any, depth: int) -> Any:
        if isinstance(value, tensor_type):
            return _from_torch(value)
        if not isinstance(value, dict) or depth == 5:
            return value
        if id(value) not in wrapped:
            wrapped[id(value)] = inner = {}
            inner |= {key: wrap(child, depth + 1) for key, child in value.items()}
        return wrapped[id(value)]

    return wrap(tree, 0)


def _from_torch(tensor: Any) -> Stored:
    def read() -> np.ndarray:
        import torch

        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"not a plain tensor ({tensor.layout}, {tensor.device})")
        size = tensor.numel() * tensor.element_size()
        if size > tensor.untyped_storage().nbytes():
            raise ValueError(f"repeated to {size} bytes out of fewer in the file")
        return tensor.detach().to(torch.float32).numpy()

    return Stored(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        read=read,
    )
