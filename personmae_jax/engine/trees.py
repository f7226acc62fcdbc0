"""Names of the arrays in a tree of parameters, as checkpoints and dumps give them."""

from typing import Any

import jax
from jaxtyping import PyTree


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Path name -> leaf, e.g. "encoder/blocks_0/mlp/bias", in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
