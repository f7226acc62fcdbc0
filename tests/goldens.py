"""Reads tests/golden/*.npz and renames PyTorch's parameters to ours."""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def linen_params(arrays: dict[str, np.ndarray], prefix: str) -> dict:
    """Nested parameters of all arrays whose PyTorch name starts with `prefix`."""
    params = {}
    for name, value in arrays.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix).replace("patch_embed.proj", "patch_embed")
        *parents, leaf = name.replace("blocks.", "blocks_").split(".")
        if value.ndim == 4:  # a convolution that does not overlap is a matrix
            value = value.transpose(2, 3, 1, 0).reshape(-1, len(value))
        elif value.ndim == 2:
            value = value.T
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value.copy()
    return params
