"""Who holds what on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np

from personmae_jax import sharding


def test_the_mesh_spans_all_devices_on_automatic_axes():
    mesh = sharding.make_mesh()
    assert mesh.size == jax.device_count() == 8
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.make_mesh(jax.devices()[:2]).size == 2


def test_rows_are_split_in_order_and_keep_their_dtype():
    mesh = sharding.make_mesh()
    batch = {"a": np.arange(16, dtype=np.uint8), "b": np.ones((16, 2), np.float32)}
    on_devices = sharding.to_devices(batch, mesh)
    for name, value in on_devices.items():
        assert value.sharding == sharding.batch_sharding(mesh)
        assert value.dtype == batch[name].dtype
        np.testing.assert_array_equal(value, batch[name])
    shards = {s.device: np.asarray(s.data) for s in on_devices["a"].addressable_shards}
    for i, device in enumerate(mesh.devices.flat):
        np.testing.assert_array_equal(shards[device], [2 * i, 2 * i + 1])


def test_every_device_holds_the_whole_state():
    mesh = sharding.make_mesh()
    state = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert sharding.state_sharding(mesh, state)["x"].is_fully_replicated
