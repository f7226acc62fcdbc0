"""Distances between features on the devices, a block of queries at a time."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from personmae_jax import sharding
from personmae_jax.reid.features import unit
from personmae_jax.reid.retrieval import BLOCK, lengths


class CosineDistances:
    """Does on a mesh what `retrieval.cosine_distances` does on the host.

    The gallery is split over the devices and stays there; the queries come to it in
    blocks, and every host gets every block. All hosts call it alike.
    """

    def __init__(self, mesh: Mesh, block: int = BLOCK):
        """Compiles nothing yet.

        Args:
          mesh: Over all devices of all hosts.
          block: Distances in one block, two of which are held at a time; at least one
            query is taken at a time.
        """
        self._mesh, self._block = mesh, block
        self._unit = jax.jit(unit, out_shardings=sharding.batch_sharding(mesh))
        self._compare = jax.jit(
            _compare,
            static_argnames="num_gallery",
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(
        self, query: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "g d"]
    ) -> Iterator[Float32[np.ndarray, "_b g"]]:
        """Yields 1 - cosine in blocks of queries, in order; all of them are q x g.

        Args:
          query: Features of the queries, the same on every host, of any length but 0.
          gallery: Features of the gallery.

        Raises:
          ValueError: A feature is zero or not finite.
        """
        for features in (query, gallery):
            lengths(features)  # raises
        columns = self._unit(sharding.to_devices(self._own_rows(gallery), self._mesh))
        rows = min(len(query), max(1, self._block // len(gallery)))
        last = None
        for start in range(0, len(query), rows):
            part = _filled(query[start : start + rows], rows)  # one size, one compile
            part = sharding.replicate(part, self._mesh)
            block = self._compare(part, columns, num_gallery=len(gallery))
            if last is not None:  # while the devices make the next one
                yield jax.device_get(last)
            last = block
        yield jax.device_get(last)[: len(query) - start]

    def _own_rows(
        self, gallery: Float32[np.ndarray, "g d"]
    ) -> Float32[np.ndarray, "_g d"]:
        """This host's part of the gallery, filled up to what splits over the mesh."""
        total = -(-len(gallery) // self._mesh.size) * self._mesh.size
        rows = total // jax.process_count()
        first = jax.process_index() * rows
        return _filled(gallery[first : first + rows], rows)


def _filled(
    features: Float32[np.ndarray, "n d"], rows: int
) -> Float32[np.ndarray, "{rows} d"]:
    """So many rows; those beyond the given ones are ones."""
    missing = rows - len(features)
    if not missing:
        return features
    return np.pad(features, ((0, missing), (0, 0)), constant_values=1)


def _compare(
    query: Float[Array, "b d"], gallery: Float[Array, "_g d"], num_gallery: int
) -> Float[Array, "b {num_gallery}"]:
    # By default TPUs and GPUs multiply float32 with fewer bits.
    cosines = jnp.einsum("bd,gd->bg", unit(query), gallery, precision="highest")
    return 1 - cosines[:, :num_gallery]
