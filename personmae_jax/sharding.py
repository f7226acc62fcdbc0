"""The mesh and who holds what; no other file names an axis.

Two axes. Rows of a batch are split over both. Parameters, moments and teacher are
whole along "data" and split along "fsdp": a device gathers them while it uses them,
and keeps its own part of their gradients' sum. So the axes change where numbers live,
not what they are, up to the order of float32 sums.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Int64, PyTree, Shaped

from personmae_jax.config import MeshConfig
from personmae_jax.errors import RunError

_DATA, _FSDP = "data", "fsdp"
_MIN_SPLIT = 2**14  # elements; splitting a norm's scale saves nothing; ours


def make_mesh(cfg: MeshConfig | None = None, devices: list[Any] | None = None) -> Mesh:
    """Returns the (data, fsdp) mesh over all devices of all hosts, or over `devices`.

    Its sizes are admitted by `config_check.check`; by default all lie along "data".
    """
    devices = jax.devices() if devices is None else devices
    fsdp = 1 if cfg is None else cfg.fsdp
    laid_out = mesh_utils.create_device_mesh(
        (len(devices) // fsdp, fsdp),
        devices,
        # Else v4:4x4x4 could be cut into parts of 4 or 16 chips, but not of 8.
        allow_split_physical_axes=True,
    )
    # Auto: under the default, Explicit, stock Linen attention fails.
    return Mesh(laid_out, (_DATA, _FSDP), (AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over all devices."""
    return NamedSharding(mesh, P((_DATA, _FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh, abstract_state: PyTree) -> PyTree:
    """Returns the sharding of every leaf: its largest dimension is split, if any.

    That is the largest one that the size of "fsdp" divides, of the first of equals; a
    leaf that has none, or fewer than 16,384 elements, is whole everywhere.
    """
    return jax.tree.map(lambda leaf: _split_largest(mesh, leaf.shape), abstract_state)


@contextlib.contextmanager
def mesh_context(mesh: Mesh) -> Iterator[None]:
    """What is traced inside knows the mesh: see `on_own_rows` and `is_on_tpu`.

    Its float32 matrix products are float32: by default a TPU rounds their factors to
    bfloat16, and a GPU to TF32. Products of bfloat16 are what they are.
    """
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        jax.default_matmul_precision("highest"),
    ):
        yield


def on_own_rows(fn: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `fn` such that every device calls it on its own rows of all arguments.

    XLA splits its own operations so by itself, but not a kernel of ours.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn
    rows = P(mesh.axis_names)
    return jax.shard_map(fn, in_specs=rows, out_specs=rows, check_vma=False)


def is_on_tpu() -> bool:
    """Whether what is traced will run on TPU; False outside `mesh_context`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def gather(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    """Returns a function that makes parameters whole on every device, inside a jit.

    Gradients through it are split again as `state_sharding` splits the parameters.
    """
    if mesh.shape[_FSDP] == 1:
        return lambda params: params
    whole = replicated(mesh)

    @jax.custom_vjp
    def gather_leaf(x):
        return jax.lax.with_sharding_constraint(x, whole)

    def split_gradient(_, gradient):
        split = _split_largest(mesh, gradient.shape)
        return (jax.lax.with_sharding_constraint(gradient, split),)

    gather_leaf.defvjp(lambda x: (gather_leaf(x), None), split_gradient)
    return lambda params: jax.tree.map(gather_leaf, params)


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Puts this host's rows of a batch (numpy, any tree) onto its devices.

    They lie where `rows_of_hosts` says. A step's sums do not depend on that order; what
    it draws for its rows it brings to them by `stream_to_device_order`.
    """
    sharding = batch_sharding(mesh)
    # With several processes jax does not count this call as an explicit transfer.
    with jax.transfer_guard("allow"):
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), batch
        )


def rows_of_hosts(mesh: Mesh, batch_size: int) -> dict[int, Int64[np.ndarray, " n"]]:
    """The rows of a global batch that each host has, ascending, by process index.

    On a TPU pod a mesh follows the links between chips, not the hosts: those of one
    host need not lie one after the other (on v5e:4x4 hosts own chips in the order
    0 0 1 1 1 1 0 2 3 3 3 3 2 2 2 0).
    """
    found: dict[int, list[np.ndarray]] = {}
    where = batch_sharding(mesh).devices_indices_map((batch_size,))
    for device, (rows,) in where.items():
        found.setdefault(device.process_index, []).append(np.arange(batch_size)[rows])
    return {host: np.sort(np.concatenate(rows)) for host, rows in found.items()}


def stream_to_device_order(
    values: Shaped[Array, "*lead b"], mesh: Mesh
) -> Shaped[Array, "*lead b"]:
    """Brings values for the rows of a batch to where `to_devices` has laid them.

    Args:
      values: The last axis is that of the rows, in the order of the stream, of which
        host p of n has rows p, p + n, ...
      mesh: Over all devices of all hosts.

    Returns:
      The same values, so that their number of hosts changes no row's own.
    """
    of_hosts = rows_of_hosts(mesh, values.shape[-1])
    order = np.empty(values.shape[-1], np.int64)
    for host, rows in of_hosts.items():
        order[rows] = np.arange(host, len(order), len(of_hosts))
    return values if len(of_hosts) == 1 else values[..., order]


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts the whole of a tree of numpy arrays, the same on every host, everywhere."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def put(tree: Any, shardings: Any) -> Any:
    """Puts a tree of numpy arrays, the same on every host, where `shardings` says.

    Raises:
      RunError: They are not the same on every host.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if jax.process_count() > 1:
        _refuse_differences(leaves)
    # jax.device_put would compare the values: all of every host's, on each device.
    with jax.transfer_guard("allow"):  # not counted as explicit
        arrays = [
            jax.make_array_from_callback(leaf.shape, where, leaf.__getitem__)
            for leaf, where in zip(leaves, jax.tree.leaves(shardings), strict=True)
        ]
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


def gather_processes(value: Any, *, is_split: bool = False) -> np.ndarray:
    """The values of all processes, in a new first axis, on each; all must call it.

    With `is_split` the value is one array whose parts they have, and the whole of it is
    returned.
    """
    # It fetches its result implicitly, which the loop refuses.
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(value, tiled=is_split))


def _refuse_differences(leaves: list[np.ndarray]) -> None:
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(leaf.tobytes())
    ours = np.frombuffer(digest.digest(), np.uint8)
    if (gather_processes(ours) != ours).any():
        raise RunError(
            "the processes of this run have read other parameters than each other, or "
            "computed others of equal data; give all of them the same files and "
            "libraries"
        )


def with_sharding(leaf: jax.ShapeDtypeStruct, where) -> jax.ShapeDtypeStruct:
    """The leaf of an abstract state or batch, told where it lives."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def matmul_dtype(name: str, mesh: Mesh) -> DTypeLike:
    """Returns the dtype `name`; "auto" is bfloat16 on TPU and GPU, float32 on CPU."""
    if name != "auto":
        return jnp.dtype(name)
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return jnp.dtype(jnp.float32 if is_cpu else jnp.bfloat16)


def _split_largest(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    size = mesh.shape[_FSDP]
    divisible = [i for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or not divisible or np.prod(shape) < _MIN_SPLIT:
        return replicated(mesh)
    largest = max(divisible, key=lambda i: shape[i])
    return NamedSharding(mesh, P(*(None,) * largest, _FSDP))
