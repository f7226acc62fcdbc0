"""The mesh and who holds what; no other file names an axis."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(devices: list | None = None) -> Mesh:
    """Returns a one-axis mesh over all devices of all hosts, or over `devices`."""
    devices = jax.devices() if devices is None else devices
    # Auto: under the default, Explicit, stock Linen attention fails.
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are split over all devices."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh, abstract_state):
    """Returns the sharding of every leaf of the state: replicated."""
    return jax.tree.map(lambda _: replicated(mesh), abstract_state)


def to_devices(batch, mesh: Mesh):
    """Puts this host's rows of a batch (numpy, any tree) onto its devices.

    Hosts' rows lie one after the other: row r of host p of n is global row
    p * (b / n) + r. Nothing that the step computes depends on that order.
    """
    sharding = batch_sharding(mesh)
    # With several processes jax does not count this call as an explicit transfer.
    with jax.transfer_guard("allow"):
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), batch
        )


def replicate(tree, mesh: Mesh):
    """Puts the whole of a tree of numpy arrays, the same on every host, everywhere."""
    with jax.transfer_guard("allow"):  # several hosts compare the values first
        return jax.device_put(tree, replicated(mesh))
