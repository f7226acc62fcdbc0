"""What stands on the encoder, by the names of PyTorch code that has it, too.

TransReID and its kin: `base.` for the encoder, `bottleneck.*` and `classifier.weight`.
TransReID-SSL's cluster-contrast-reid: `module.` for everything, as nn.DataParallel
names it, and no classifier; it loads such a file strictly at the end of training.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

_HEAD = ("bottleneck.", "classifier.")


def head_tensors(head: Mapping[str, Any], step: int) -> Tensors:
    """Returns the head of a fine-tuned or adapted run by TransReID's names.

    Args:
      head: Of `checkpoint.restore_head`.
      step: Of the checkpoint.
    """
    params, statistics = head["params"], head["statistics"]
    scale = np.asarray(params["bottleneck"]["scale"], np.float32)
    tensors = {
        "bottleneck.weight": scale,
        "bottleneck.bias": np.zeros_like(scale),
        "bottleneck.running_mean": np.asarray(statistics["mean"], np.float32),
        "bottleneck.running_var": np.asarray(statistics["var"], np.float32),
        "bottleneck.num_batches_tracked": np.array(step, np.int64),
    }
    if "classifier" in params:  # no identity was known to a run without one
        kernel = params["classifier"]["kernel"]
        tensors["classifier.weight"] = np.ascontiguousarray(kernel.T)
    if "camera_embed" in params:
        tensors["sie_embed"] = np.asarray(params["camera_embed"])[:, None].copy()
    return tensors


def to_transreid(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns all tensors, the encoder's and `sie_embed` below "base."."""
    return {
        name if name.startswith(_HEAD) else f"base.{name}": array
        for name, array in tensors.items()
    }


def to_cluster_contrast(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns the encoder's and the batch norm's tensors below "module."."""
    left_out = ("classifier.weight", "sie_embed")
    return {f"module.{n}": a for n, a in tensors.items() if n not in left_out}
