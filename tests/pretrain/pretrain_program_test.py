"""The assembled program on one device and on eight."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_batch, tiny_config

from personmae_jax import sharding
from personmae_jax.config import Config
from personmae_jax.engine.program import Program
from personmae_jax.errors import ConfigError
from personmae_jax.pretrain import program
from personmae_jax.pretrain.train_step import make_loss_fn, make_train_step

METRICS = {
    *("loss", "pixel_loss", "feature_loss", "feature_weight", "lr", "ema_decay"),
    *("grad_norm", "param_norm", "teacher_std", "feature_explained"),
}
NUM_STEPS = 1500  # the teacher's decay is 2/3 at first: its average has a history


def config(**train) -> Config:
    cfg = tiny_config()
    cfg.train = dataclasses.replace(cfg.train, batch_size=16, **train)
    cfg.optim.warmup = 0.0
    cfg.optim.base_lr = 0.016  # 1e-3 at a batch of 16
    return cfg


def build(num_devices=8, cfg=None) -> Program:
    cfg = cfg or config()
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:num_devices])
    return program.build(cfg, mesh, NUM_STEPS)


def batch_of(run, seed=0):
    return sharding.to_devices(tiny_batch(run.cfg, seed), run.mesh)


TRACES = []  # one entry each time that the step of the fixture `eight` is traced


@pytest.fixture(scope="module")
def eight():
    def counting(*args, **kwargs):
        step = make_train_step(*args, **kwargs)

        def counted(state, batch):
            TRACES.append(1)
            return step(state, batch)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_train_step", counting)
        return build()


@pytest.fixture(scope="module")
def one():
    return build(1)


@pytest.fixture(scope="module")
def eight_step(eight):
    """(state, metrics) after one real step on eight devices."""
    return eight.train_step(eight.init_state(), batch_of(eight))


def assert_same_step(stepped, other):
    """Same loss and gradients, which Adam's first moment holds after one step."""
    (state, metrics), (other_state, other_metrics) = jax.device_get((stepped, other))
    for name in ("loss", "pixel_loss", "feature_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-5)
    moments = (optax.tree.get(s.opt_state, "mu") for s in (state, other_state))
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(m)]) for m in moments)
    # Float32 sums in another order: 1e-6 of the whole gradient.
    assert np.linalg.norm(a - b) < 2e-6 * np.linalg.norm(a)


def test_one_device_and_eight_start_bitwise_equal(one, eight):
    states = jax.device_get((one.init_state(), eight.init_state()))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_one_device_and_eight_have_the_same_loss_and_gradients(one, eight_step):
    assert_same_step(eight_step, one.train_step(one.init_state(), batch_of(one)))


def test_micro_batches_give_the_same_step_and_devices_exchange_sums_alone(eight_step):
    """No device ever asks for another's rows, so no gather and no permutation."""
    halves = build(cfg=config(accumulate=2))
    lowered = halves.train_step.lower(halves.abstract_state, halves.abstract_batch)
    step = lowered.compile()
    assert_same_step(eight_step, step(halves.init_state(), batch_of(halves)))
    exchanges = r" (all-\w+|collective-\w+|reduce-scatter|ragged-\w+)\("
    assert set(re.findall(exchanges, step.as_text())) == {"all-reduce"}


@pytest.fixture(scope="module", params=[2, 4, 8])
def split(request):
    """Parameters split over so many of the eight devices; small ones too."""
    cfg = config()
    cfg.mesh.fsdp = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_MIN_SPLIT", 64)
        run = build(cfg=cfg)
        lowered = run.train_step.lower(run.abstract_state, run.abstract_batch)
        return run, lowered.compile(), jax.device_get(run.init_state())


def test_split_over_devices_the_step_is_the_same(eight, eight_step, split):
    run, step, initial = split
    jax.tree.map(np.testing.assert_array_equal, initial, eight.init_state())
    assert_same_step(eight_step, step(run.init_state(), batch_of(run)))


def test_split_over_devices_each_keeps_its_part_of_every_matrix(split):
    run, step, _ = split
    fsdp = run.cfg.mesh.fsdp
    state, _ = step(run.init_state(), batch_of(run))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        part = leaf.addressable_shards[0].data.size
        is_split = leaf.size >= 64 and any(n % fsdp == 0 for n in leaf.shape)
        assert part * (fsdp if is_split else 1) == leaf.size, path
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held < whole / fsdp + 0.1 * whole  # small biases and norms stay whole


def test_split_over_devices_parameters_travel_and_rows_do_not(split):
    """Whatever is gathered has the size of parameters; activations stay at home."""
    run, step, _ = split
    sizes = {tuple(x.shape) for x in jax.tree.leaves(run.abstract_state.params)}
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", step.as_text())
    assert gathered
    for text in gathered:
        shape = tuple(int(n) for n in text.split(","))
        assert shape in sizes, shape


def test_computing_blocks_again_changes_no_number_and_saves_memory(one):
    again = build(1, config(remat="block"))
    assert_same_step(
        one.train_step(one.init_state(), batch_of(one)),
        again.train_step(again.init_state(), batch_of(again)),
    )

    def kept(run) -> int:
        """Elements that the backward pass keeps of the forward pass."""

        def forward(state, batch):
            def loss(params):
                return make_loss_fn(run.cfg, jnp.float32)(
                    params, state.teacher_params, 1.0, batch
                )[0]

            return jax.vjp(loss, state.params)[1]

        residuals = jax.eval_shape(forward, run.abstract_state, run.abstract_batch)
        return sum(x.size for x in jax.tree.leaves(residuals))

    assert kept(again) < 0.7 * kept(one)


def test_the_teacher_starts_as_the_student(eight):
    state = eight.init_state()
    jax.tree.map(
        np.testing.assert_array_equal, state.params["encoder"], state.teacher_params
    )
    assert state.step == 0


def test_the_teacher_is_the_moving_average_of_the_students_encoders(eight):
    state = eight.init_state()
    average = jax.tree.map(np.float64, jax.device_get(state.teacher_params))
    for step in range(5):
        state, metrics = eight.train_step(state, batch_of(eight, seed=step))
        tau = 0.002 + (0.02 - 0.002) * step / 750
        decay = 1 - 1 / (tau * NUM_STEPS)
        np.testing.assert_allclose(metrics["ema_decay"], decay, rtol=1e-6)
        average = jax.tree.map(
            lambda a, x, d=decay: d * a + (1 - d) * np.float64(x),
            average,
            jax.device_get(state.params["encoder"]),
        )
    assert state.step == 5
    jax.tree.map(
        # Five float32 updates of weights of order 1.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        jax.device_get(state.teacher_params),
        average,
    )
    student = state.params["encoder"]["patch_embed"]["kernel"]
    assert np.abs(student - average["patch_embed"]["kernel"]).max() > 1e-3


def test_many_steps_are_one_trace_and_move_nothing_unasked(eight):
    state = eight.init_state()
    batches = [batch_of(eight, seed) for seed in range(3)]
    eight.train_step(eight.init_state(), batches[0])  # compiled by now
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, _ = eight.train_step(state, batch)
    assert state.step == 3
    assert len(TRACES) == 1


def test_the_step_takes_the_states_memory_over(eight):
    state = eight.init_state()
    eight.train_step(state, batch_of(eight))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_metrics_are_float32_scalars_of_the_names_that_stay_put(eight_step):
    _, metrics = eight_step
    assert metrics.keys() == METRICS
    for name, value in metrics.items():
        assert (value.shape, value.dtype) == ((), jnp.float32), name
        assert np.isfinite(value), name


def test_the_state_keeps_its_shapes_dtypes_and_shardings(eight, eight_step):
    state, _ = eight_step
    for abstract, leaf in zip(
        jax.tree.leaves(eight.abstract_state), jax.tree.leaves(state), strict=True
    ):
        assert (abstract.shape, abstract.dtype) == (leaf.shape, leaf.dtype)
        assert abstract.sharding == leaf.sharding


def test_bfloat16_keeps_parameters_and_moments_in_float32():
    run = build(cfg=config(matmul_dtype="bfloat16"))
    state, metrics = jax.eval_shape(
        run.train_step, run.abstract_state, run.abstract_batch
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, metrics)):
        is_integer = str(path[-1]) in (".step", ".count")
        assert leaf.dtype == (jnp.int32 if is_integer else jnp.float32), path


def test_steps_on_one_batch_lower_the_loss(eight):
    state, batch = eight.init_state(), batch_of(eight)
    values = []
    for _ in range(30):
        state, metrics = eight.train_step(state, batch)
        values.append(float(metrics["pixel_loss"]))
    assert values[-1] < 0.98 * values[0]  # of noise, which one must learn by heart


def test_the_batch_is_what_the_structure_says(eight):
    batch = batch_of(eight)
    assert batch.keys() == eight.abstract_batch.keys()
    for name, abstract in eight.abstract_batch.items():
        assert abstract.shape == batch[name].shape
        assert abstract.dtype == batch[name].dtype
        assert abstract.sharding == batch[name].sharding


@pytest.mark.parametrize("target", ["normalised", "raw"])
def test_reconstructions_are_pictures_of_region_b(eight, target):
    cfg = config()
    cfg.loss.pixel_target = target
    run = build(cfg=cfg)
    batch = jax.device_put(tiny_batch(cfg), sharding.replicated(run.mesh))
    pictures = program.make_reconstruct(cfg, run)(eight.init_state().params, batch)
    assert pictures.shape == batch["region_b"].shape
    assert pictures.dtype == jnp.uint8
    # The head starts at almost 0: every patch of its mean colour, or all of ImageNet's.
    expected = np.array(batch["region_b"], np.float64).reshape(16, 4, 4, 2, 4, 3)
    if target == "normalised":
        scaled = (expected / 255 - cfg.data.mean) / cfg.data.std
        mean = scaled.mean((2, 4, 5), keepdims=True)
        expected = (mean * cfg.data.std + cfg.data.mean) * 255
    else:
        expected = np.array(cfg.data.mean) * 255
    expected = np.broadcast_to(expected, (16, 4, 4, 2, 4, 3)).reshape(pictures.shape)
    assert np.abs(np.float64(pictures) - expected).max() < 3.0


def test_a_teacher_that_keeps_its_start_is_refused():
    cfg = config()
    cfg.teacher.start_fraction = cfg.teacher.end_fraction = 1.0
    with pytest.raises(ConfigError, match="of the initial weights"):
        build(cfg=cfg)


def test_steps_are_epochs_of_the_records_unless_given():
    cfg = Config()
    assert program.count_steps(cfg, 4_180_243) == 306_170
    cfg.train.steps = 7
    assert program.count_steps(cfg, 4_180_243) == 7


def test_less_than_one_batch_is_refused():
    cfg = Config()
    cfg.train.epochs = 1
    with pytest.raises(ConfigError, match="less than one batch of 4096"):
        program.count_steps(cfg, 4095)


def test_products_are_float32_on_the_cpu_unless_asked_otherwise(eight):
    assert sharding.matmul_dtype("auto", eight.mesh) == jnp.float32
    assert sharding.matmul_dtype("bfloat16", eight.mesh) == jnp.bfloat16
