"""Who holds what on eight devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax import sharding
from personmae_jax.config import MeshConfig


def make_mesh(fsdp: int):
    return sharding.make_mesh(MeshConfig(fsdp=fsdp))


def split_axes(mesh, *shape: int) -> tuple[bool, ...]:
    """Of each dimension, whether the state's rule splits it."""
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    part = sharding.state_sharding(mesh, leaf).shard_shape(shape)
    return tuple(a < b for a, b in zip(part, shape, strict=True))


def test_the_mesh_spans_all_devices_on_automatic_axes():
    mesh = sharding.make_mesh()
    assert mesh.size == jax.device_count() == 8
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.make_mesh(devices=jax.devices()[:2]).size == 2
    assert make_mesh(4).devices.shape == (2, 4)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_rows_are_split_in_order_over_all_devices_and_keep_their_dtype(fsdp):
    mesh = make_mesh(fsdp)
    batch = {"a": np.arange(16, dtype=np.uint8), "b": np.ones((16, 2), np.float32)}
    on_devices = sharding.to_devices(batch, mesh)
    for name, value in on_devices.items():
        assert value.sharding == sharding.batch_sharding(mesh)
        assert value.dtype == batch[name].dtype
        np.testing.assert_array_equal(value, batch[name])
    shards = {s.device: np.asarray(s.data) for s in on_devices["a"].addressable_shards}
    for i, device in enumerate(mesh.devices.flat):
        np.testing.assert_array_equal(shards[device], [2 * i, 2 * i + 1])


class Device(NamedTuple):
    """As much of a device as tells which rows of a batch are on it."""

    id: int
    process_index: int


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [1, 0, 0, 1]])
def test_what_is_drawn_for_a_row_is_brought_to_where_its_host_lays_it(
    hosts, monkeypatch
):
    mesh, of_rows = sharding.make_mesh(), jnp.arange(24).reshape(3, 8)
    assert list(sharding.rows_of_hosts(mesh, 8)[0]) == [*range(8)]
    got = sharding.stream_to_device_order(of_rows, mesh)
    np.testing.assert_array_equal(got, of_rows)

    class OnSeveralHosts:
        """A mesh that follows the links between chips, as on a TPU pod."""

        def devices_indices_map(self, shape):
            devices = (Device(i, host) for i, host in enumerate(hosts))
            return {d: (slice(2 * d.id, 2 * d.id + 2),) for d in devices}

    monkeypatch.setattr(sharding, "batch_sharding", lambda _: OnSeveralHosts())
    rows = sharding.rows_of_hosts(mesh, 8)
    laid = np.asarray(sharding.stream_to_device_order(of_rows, mesh))
    for host in (0, 1):
        of_host = [i for i in range(8) if hosts[i // 2] == host]
        assert list(rows[host]) == of_host
        np.testing.assert_array_equal(laid[:, of_host], of_rows[:, host::2])


def test_without_fsdp_every_device_holds_the_whole_state():
    state = {"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    sharding_of = sharding.state_sharding(sharding.make_mesh(), state)
    assert sharding_of["x"].is_fully_replicated


def test_the_largest_dimension_that_divides_is_split():
    mesh = make_mesh(4)
    assert split_axes(mesh, 768, 3072) == (False, True)
    assert split_axes(mesh, 3072, 768) == (True, False)
    assert split_axes(mesh, 768, 768) == (True, False)
    assert split_axes(mesh, 768, 3074) == (True, False)
    assert split_axes(mesh, 1, 129, 768) == (False, False, True)


def test_small_and_indivisible_leaves_are_whole():
    mesh = make_mesh(4)
    assert split_axes(mesh, 127, 127) == (False, False)
    assert split_axes(mesh, 4, 4095) == (False, False)
    assert split_axes(mesh, 4, 4096) == (False, True)
    assert split_axes(mesh) == ()


def test_gathered_parameters_are_whole_and_their_gradients_split_again():
    mesh = make_mesh(4)
    x = jnp.arange(2.0**14).reshape(128, 128)
    split = sharding.state_sharding(mesh, x)
    assert not split.is_fully_replicated

    def loss(x):
        whole = sharding.gather(mesh)(x)
        return (whole**3).sum(), whole

    run = jax.jit(jax.grad(loss, has_aux=True), in_shardings=split)
    gradient, whole = run(jax.device_put(x, split))
    assert whole.sharding.is_fully_replicated
    assert gradient.sharding == split
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_allclose(gradient, 3 * x**2)
