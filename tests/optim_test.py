"""Schedules and AdamW against MAE's and PyTorch's numbers, and their limits."""

import tracemalloc

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from personmae_jax import optim
from personmae_jax.config import LossConfig, OptimConfig, TeacherConfig, TrainConfig
from personmae_jax.errors import ConfigError

# The full run of 300 epochs on LUPerson, and the quickstart's length.
LENGTHS = [1, 2, 3, 10, 100, 1_500, 306_000]


def learning_rates(num_steps, **settings):
    schedule = optim.learning_rate_schedule(
        OptimConfig(**settings), TrainConfig(), num_steps
    )
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(num_steps + 1)))


def test_learning_rate_is_maes():
    golden = goldens.load("schedules")["learning_rate"]
    # Float32 steps and cosines: 1e-6 of the peak.
    np.testing.assert_allclose(
        learning_rates(300), golden, rtol=1e-5, atol=1e-6 * golden.max()
    )


def test_learning_rate_rises_from_zero_to_the_peak_and_falls_to_zero():
    rates = learning_rates(300, base_lr=1e-3)
    assert rates[0] == 0.0
    np.testing.assert_allclose(rates[40], 1e-3 * 4096 / 256, rtol=1e-6)
    assert rates.argmax() == 40
    np.testing.assert_allclose(rates[-1], 0.0, atol=1e-9)
    assert rates[-2] > 0.0


def test_the_peak_rate_is_the_same_at_any_batch_size():
    for batch_size in (64, 4096):
        schedule = optim.learning_rate_schedule(
            OptimConfig(lr=1e-3, base_lr=7.0, warmup=0.1),
            TrainConfig(batch_size=batch_size),
            100,
        )
        np.testing.assert_allclose(schedule(10), 1e-3, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 40 / 300, 1.0])
def test_short_runs_have_finite_rates_and_some_above_zero(num_steps, warmup):
    rates = learning_rates(num_steps, warmup=warmup)
    assert np.isfinite(rates).all()
    assert (rates >= 0.0).all()
    assert num_steps < 3 or rates[:-1].max() > 0.0


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_shortest_runs_learn_from_their_first_step(num_steps):
    assert learning_rates(num_steps)[0] > 0.0


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_feature_weight_ramps_over_its_fraction_then_stays(num_steps):
    loss = LossConfig(feature_weight=2.0, feature_ramp=0.25)
    schedule = optim.feature_weight_schedule(loss, num_steps)
    steps = np.linspace(0, num_steps, 9).astype(int)
    weights = np.array([schedule(step) for step in steps])
    assert np.isfinite(weights).all()
    assert (np.diff(weights) >= 0.0).all()
    np.testing.assert_allclose(weights[-1], 2.0)
    if num_steps >= 1000:
        np.testing.assert_allclose(weights[:4], [0, 1, 2, 2], atol=0.01)


def test_no_ramp_means_full_weight_at_once():
    loss = LossConfig(feature_weight=2.0, feature_ramp=0.0)
    assert optim.feature_weight_schedule(loss, 1000)(0) == 2.0


@pytest.mark.parametrize(
    ("num_steps", "first", "last"),
    [(306_000, 0.99837, 0.99984), (1_500, 0.6667, 0.9667)],
)
def test_teacher_decay_has_the_numbers_of_the_method(num_steps, first, last):
    decay = optim.ema_decay_schedule(TeacherConfig(), num_steps)
    np.testing.assert_allclose(decay(0), first, atol=5e-5)
    np.testing.assert_allclose(decay(num_steps // 2), last, atol=5e-5)
    np.testing.assert_allclose(decay(num_steps - 1), last, atol=5e-5)


def test_teacher_decay_stays_between_zero_and_its_maximum_for_any_length():
    for num_steps in [*range(1, 2001, 3), 306_000, 10_000_000]:
        decay = optim.ema_decay_schedule(TeacherConfig(), num_steps)
        decays = decay(np.linspace(0, num_steps - 1, 7).astype(int))
        assert (decays >= 0.0).all()
        assert (decays <= 0.9999).all()
        assert (np.diff(decays) >= 0.0).all()


def test_teacher_decay_is_the_same_on_the_device_and_on_the_host():
    decay = optim.ema_decay_schedule(TeacherConfig(), 1500)
    steps = np.arange(0, 1500, 100)
    on_device = jax.jit(jax.vmap(decay))(jnp.asarray(steps))
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, decay(steps), rtol=1e-6)


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_default_teacher_forgets_its_start_in_a_run_of_any_length(num_steps):
    optim.check_teacher(TeacherConfig(), num_steps)


def test_a_teacher_that_keeps_its_start_is_refused():
    # It remembers the whole run: (1 - 1 / 5000) ** 5000 is 1 / e.
    teacher = TeacherConfig(start_fraction=1.0, end_fraction=1.0, max_decay=1.0)
    with pytest.raises(ConfigError, match=r"37% .* 5000 steps .*end_fraction"):
        optim.check_teacher(teacher, 5000)


def test_the_longest_run_is_checked_in_little_memory():
    teacher = TeacherConfig(start_fraction=1.0, end_fraction=1.0, max_decay=1.0)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="37% .* 2147483647 steps"):
            optim.check_teacher(teacher, 2**31 - 1)
        assert tracemalloc.get_traced_memory()[1] < 50e6  # bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("num_steps", "left"), [(2, "25%"), (3, "30%")])
def test_what_a_short_run_leaves_is_the_product_of_its_decays(num_steps, left):
    # 1/2 * 1/2; 2/3 * 2/3 * 2/3
    teacher = TeacherConfig(start_fraction=1.0, end_fraction=1.0)
    with pytest.raises(ConfigError, match=f"leaves {left} of"):
        optim.check_teacher(teacher, num_steps)


def test_a_decay_is_never_above_the_greatest():
    # 1 - 1 / 306,000 would leave 37 %, 0.9999 leaves nothing.
    teacher = TeacherConfig(start_fraction=1.0, end_fraction=1.0)
    optim.check_teacher(teacher, 306_000)


def test_adamw_is_pytorchs():
    golden = goldens.load("adamw")
    rates = jnp.asarray(golden["learning_rates"], jnp.float32)
    tx = optim.make_optimizer(OptimConfig(), lambda step: rates[step])

    def tree(prefix):
        names = [k.removeprefix(prefix) for k in golden if k.startswith(prefix)]
        return {name: jnp.asarray(golden[prefix + name]) for name in names}

    params = tree("start/")
    state = tx.init(params)
    for step in range(len(rates)):
        updates, state = tx.update(tree(f"grad{step}/"), state, params)
        params = optax.apply_updates(params, updates)
        for name, value in params.items():
            # Float32 moments of gradients that shrink a hundredfold each step.
            np.testing.assert_allclose(
                value,
                golden[f"after{step}/{name}"],
                rtol=2e-6,
                atol=2e-6,
                err_msg=f"{name} after step {step}",
            )


def test_weight_decay_shrinks_matrices_alone():
    params = {
        name: jnp.ones((2, 2))
        for name in ("kernel", "bias", "scale", "cls_token", "mask_token")
    }
    cfg = OptimConfig(weight_decay=0.5)
    tx = optim.make_optimizer(cfg, lambda step: 0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates.pop("kernel"), -0.05)
    assert not any(np.any(x) for x in updates.values())


def test_clipping_is_off_unless_asked_for():
    params = {"kernel": jnp.zeros((2, 2))}
    for clip_norm, scale in ((None, 1.0), (1.0, 0.01)):
        tx = optim.make_optimizer(OptimConfig(clip_norm=clip_norm), lambda step: 0.1)
        grads = {"kernel": jnp.full((2, 2), 50.0)}  # global norm 100
        _, state = tx.update(grads, tx.init(params), params)
        moment = optax.tree.get(state, "mu")["kernel"]
        np.testing.assert_allclose(moment, 0.1 * 50.0 * scale, rtol=1e-5)
