"""Opens untrusted PyTorch and safetensors files; runs nothing that is in them."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from personmae_jax import foreign_files
from personmae_jax.data.safe_pickle import Opaque
from personmae_jax.errors import ConfigError, first_line
from personmae_jax.pytorch import torch_save
from personmae_jax.pytorch.stored import Stored

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


class Opened(NamedTuple):
    """What a file holds."""

    tree: dict[Any, Any]  # nested, with `Stored` leaves and whatever else the file has
    metadata: dict[str, str]  # of a safetensors file; empty for PyTorch's


def open_file(path: os.PathLike[str] | str) -> Opened:
    """Returns what a .pth, .pt or .safetensors file holds, whatever its ending.

    Raises:
      ConfigError: One sentence on a file that is missing, damaged or of another kind.
    """
    file = _find(os.fspath(path))
    if file.name.endswith(".index.json"):
        return _open_shards(file)
    try:
        with foreign_files.open_file(file) as f:
            head = f.read(16)
    except FileNotFoundError as e:
        raise ConfigError(f"{_name(path)}: there is no such file") from e
    except OSError as e:
        raise ConfigError(f"{_name(path)} cannot be read ({e.strerror})") from e
    if head[8:9] == b"{":
        return _open_safetensors(file)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return Opened(_open_torch(file), {})
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
        are_files = (n and n.isprintable() and Path(n).name == n for n in names)
        if not all(are_files) or any(n.endswith(".json") for n in names):
            raise ValueError("of indices, or files that are not beside it")
    except OSError as e:
        raise ConfigError(f"{_name(file)} cannot be read ({e.strerror})") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ConfigError(f"{_name(file)} is no index of a model in parts") from e
    tree: dict[Any, Any] = {}
    for name in names:
        tree |= open_file(file.parent / name).tree
    return Opened(tree, {})


def _damaged(file: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{_name(file)} cannot be read ({first_line(error)}); it is damaged, cut short "
        "or of another kind: fetch it again"
    )


def _open_safetensors(file: Path) -> Opened:
    try:
        opened = safe_open(file, framework="numpy")
        with foreign_files.open_file(file) as f:  # safetensors takes the last of twins
            foreign_files.parse_json(f.read(int.from_bytes(f.read(8), "little")))
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
        raise _damaged(file, e) from e


def _open_torch(file: Path) -> dict[Any, Any]:
    try:
        tree = torch_save.load(file)
    except torch_save.OtherKind as e:
        raise ConfigError(f"{_name(file)} {e}") from e
    except Exception as e:  # damaged files raise nearly anything
        raise _damaged(file, e) from e
    if isinstance(tree, dict):
        return tree
    kind = tree.name if isinstance(tree, Opaque) else type(tree).__name__.lower()
    raise ConfigError(
        f"{_name(file)} holds a {kind[:160]}, not a dict of named tensors; if it is a "
        "whole model, load it where its code is and torch.save its state_dict()"
    )
