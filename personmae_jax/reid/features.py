"""Features of images: decoded by threads, encoded in batches over the mesh."""

from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32, Int64, PyTree, UInt8

from personmae_jax import pixels, sharding
from personmae_jax.config import EncoderConfig, ImageConfig, grid_of
from personmae_jax.data.records import Records
from personmae_jax.data.workers import num_cores
from personmae_jax.errors import ConfigError
from personmae_jax.models import personmae
from personmae_jax.models.batch_norm import normalise
from personmae_jax.reid.datasets import ReidDataset, read_resized
from personmae_jax.reid.occlusion import occlude

# (params, images, cameras) -> one feature an image, of any length but 0.
Encode = Callable[
    [PyTree, UInt8[Array, "b height width 3"], Int32[Array, " b"]], Float[Array, "b d"]
]
# (pixels, record) -> None: changes a resized image in place, e.g. hides a part of it.
Change = Callable[[UInt8[np.ndarray, "height width 3"], int], None]

Features = Float32[np.ndarray, "_n d"]
Numbers = Sequence[int] | Int[np.ndarray, " _n"]

FEATURES = ("cls", "mean", "stripes", "cls+mean", "patches")

_NUM_STRIPES = 8  # PCB has six; a grid of 16 rows, the field's, splits into eight


def make_encode(
    encoder: EncoderConfig,
    data: ImageConfig,
    feature: str = "cls",
    dtype: DTypeLike = "float32",
) -> Encode:
    """Returns the function from an encoder's parameters and images to features.

    Args:
      encoder: The architecture.
      data: Size and statistics of the images.
      feature: Of the tokens after the final norm: "cls", the "mean" of the patches',
        or both, each of unit length, one after the other; or all "patches", each at
        its place, which takes n times the memory.
      dtype: Of matrix products and activations.

    Raises:
      ConfigError: There is no such feature.
    """
    if feature not in FEATURES:
        raise ConfigError(f"feature {feature!r} is unknown; take {', '.join(FEATURES)}")

    def encode(params: PyTree, images: Array, cameras: Array) -> Array:
        del cameras  # an encoder that was not told of them
        tokens = encode_tokens(encoder, data, params, images, dtype=dtype)
        grid = grid_of(encoder, data)
        parts = [unit(pool(tokens, part, grid)) for part in feature.split("+")]
        return jnp.concatenate(parts, axis=-1)

    return encode


def make_neck_encode(
    encoder: EncoderConfig, data: ImageConfig, token: str, dtype: DTypeLike
) -> Encode:
    """Returns what makes the features after the batch norm of a run on people.

    Its `params` are a dict of the network's `params`, `encoder` and `bottleneck`, and
    of the running `statistics`. The batch norm takes `token`, one of `pool`'s.
    """

    def encode(state: PyTree, images: Array, cameras: Array) -> Array:
        del cameras
        params: Any = state["params"]
        tokens = encode_tokens(encoder, data, params["encoder"], images, dtype=dtype)
        feature = pool(tokens, token, grid_of(encoder, data))
        return normalise(feature, params["bottleneck"]["scale"], state["statistics"])

    return encode


def encode_tokens(
    encoder: EncoderConfig,
    data: ImageConfig,
    params: PyTree,
    images: UInt8[Array, "b height width 3"],
    **how: Any,
) -> Float[Array, "b t d"]:
    """Float32 tokens after the final norm, cls first; `how`: of `personmae.encode`."""
    patches = pixels.normalised_patches(images, encoder.patch_size, data.mean, data.std)
    grid = grid_of(encoder, data)
    tokens = personmae.encode(encoder, grid, params, patches, **how).tokens
    return tokens.astype(jnp.float32)


def pool(
    tokens: Float[Array, "b t d"], feature: str, grid: tuple[int, int]
) -> Float[Array, "b _d"]:
    """One feature of an image's tokens.

    Args:
      tokens: After the final norm, cls first, then the patches in raster order.
      feature: "cls", the "mean" of the patches, all "patches" end to end, or
        "stripes": the means of eight horizontal stripes, end to end, each over the
        middle half of the columns.
      grid: Rows and columns of patches.

    Source of the stripes: PCB (arXiv 1711.09349). The middle half is ours: a crop
    shows its person there, and the background on both sides says where, not who.
    """
    if feature == "cls":
        return tokens[:, 0]
    if feature == "mean":
        return jnp.mean(tokens[:, 1:], axis=1)
    if feature == "patches":
        return tokens[:, 1:].reshape(len(tokens), -1)
    rows, columns = grid
    patches = tokens[:, 1:].reshape(len(tokens), rows, columns, -1)
    middle = patches[:, :, columns // 4 : columns - columns // 4]
    stripes = jnp.array_split(middle, _num_stripes(grid), axis=1)
    return jnp.concatenate([jnp.mean(x, axis=(1, 2)) for x in stripes], axis=-1)


def feature_width(feature: str, grid: tuple[int, int], width: int) -> int:
    """Length of `pool`'s "cls", "mean" or "stripes" of tokens of `width` channels."""
    return width * (_num_stripes(grid) if feature == "stripes" else 1)


def _num_stripes(grid: tuple[int, int]) -> int:
    return min(_NUM_STRIPES, grid[0])


def with_mirror_image(encode: Encode) -> Encode:
    """Returns what adds up the features of an image and of its mirror image."""

    def encode_both(params: PyTree, images: Array, cameras: Array) -> Array:
        mirrored = images[:, :, ::-1]
        return encode(params, images, cameras) + encode(params, mirrored, cameras)

    return encode_both


class Extractor:
    """Turns records into features; compiled once, called by every host alike."""

    def __init__(self, encode: Encode, data: ImageConfig, mesh: Mesh, batch_size: int):
        """Compiles nothing yet.

        `encode` gets `batch_size` images at once, over all devices of the mesh, rounded
        up to what splits over them, of `data`'s size.
        """
        self._data, self._mesh = data, mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size

        def on_mesh(params: PyTree, images: Array, cameras: Array) -> Array:
            with sharding.mesh_context(mesh):
                return encode(params, images, cameras)

        self._encode = jax.jit(on_mesh, out_shardings=sharding.replicated(mesh))

    def __call__(
        self,
        params: PyTree,
        records: Records,
        indices: Numbers,
        cameras: Numbers | None = None,
        change: Change | None = None,
    ) -> Float32[np.ndarray, "n d"]:
        """Returns the features of `indices`, in order, the same on every host.

        Args:
          params: As `encode` takes them, on the devices.
          records: The same on every host; a host reads its part.
          indices: Of the records, at least one.
          cameras: That saw each of `indices`; for an `encode` that wants to know.
          change: What is done to every image before it is encoded.

        Raises:
          RunError: An image cannot be used; names it.
        """
        if cameras is None:
            cameras = [0] * len(indices)
        of_hosts = sharding.rows_of_hosts(self._mesh, self._batch_size)
        own, size = of_hosts[jax.process_index()], (self._data.height, self._data.width)
        found: list[np.ndarray] = []
        last: jax.Array | None = None
        with futures.ThreadPoolExecutor(num_cores()) as pool:

            def read(start: int) -> list[futures.Future]:
                chosen = [int(indices[i]) for i in start + own if i < len(indices)]
                return [pool.submit(self._read, records, i, change) for i in chosen]

            ahead = read(0)
            for start in range(0, len(indices), self._batch_size):
                tasks, ahead = ahead, read(start + self._batch_size)
                pixels = np.zeros((len(own), *size, 3), "u1")
                seen_by = np.zeros(len(own), np.int32)
                for row, task in enumerate(tasks):
                    pixels[row] = task.result()
                    seen_by[row] = cameras[start + own[row]]
                batch = sharding.to_devices((pixels, seen_by), self._mesh)
                features = self._encode(params, *batch)
                if last is not None:  # while the devices make the next ones
                    found.append(jax.device_get(last))
                last = features
        found.append(jax.device_get(last))
        return np.concatenate(found)[: len(indices)]

    def of_people(
        self,
        params: PyTree,
        people: ReidDataset,
        cameras: Int[np.ndarray, " _n"] | None = None,
    ) -> tuple[Features, Features, Features]:
        """Returns features of the queries, of the gallery, and of occluded queries.

        An image that is query and gallery is encoded once.
        """

        def extract(records: Int64[np.ndarray, " n"], change: Change | None = None):
            seen_by = None if cameras is None else cameras[records]
            return self(params, people.records, records, seen_by, change)

        once = np.union1d(people.query, people.gallery)
        whole = extract(once)
        return (
            whole[np.searchsorted(once, people.query)],
            whole[np.searchsorted(once, people.gallery)],
            extract(people.query, occlude),
        )

    def _read(
        self, records: Records, index: int, change: Change | None
    ) -> UInt8[np.ndarray, "height width 3"]:
        pixels = np.empty((self._data.height, self._data.width, 3), np.uint8)
        read_resized(records, index, self._data, pixels)
        if change is not None:
            change(pixels, index)
        return pixels


def camera_centred(
    features: Float32[np.ndarray, "n d"], cameras: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, "n d"]:
    """Returns the features, each less the mean of those of its camera.

    An untrained or half-trained encoder tells cameras apart long before people: what
    one camera's images share outweighs who is in them. This takes it off and asks for
    no identity. The feature of a camera with one image stays: nothing would be left.

    Source: the idea, Camera-based Batch Normalization (arXiv 2001.08680), which aligns
    cameras so inside the network.
    """
    centred = features.copy()
    for camera in np.unique(cameras):
        seen_by = np.flatnonzero(cameras == camera)
        if len(seen_by) > 1:
            centred[seen_by] -= features[seen_by].mean(axis=0)
    return centred


def unit(vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Vectors of length 1 in the same directions; those of length 0 become nan."""
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
