"""Every setting that cannot train is refused with one sentence that helps."""

import math
import re
import typing

import numpy as np
import pytest
from tiny import tiny_config

from personmae_jax import config_check
from personmae_jax.config import Config
from personmae_jax.config_check import check
from personmae_jax.config_values import field_paths
from personmae_jax.errors import ConfigError


def synthetic() -> Config:
    cfg = Config()
    cfg.data.source = "synthetic"
    return cfg


def folder_at(path: str) -> Config:
    cfg = synthetic()
    cfg.data.source, cfg.data.path = "folder", path
    return cfg


def set_field(cfg: Config, path: str, value) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        cfg = getattr(cfg, section)
    setattr(cfg, leaf, value)


def problems(device_count=None, **fields) -> str:
    cfg = synthetic()
    for path, value in fields.items():
        set_field(cfg, path.replace("__", "."), value)
    with pytest.raises(ConfigError) as error:
        check(cfg, device_count)
    return str(error.value)


@pytest.mark.parametrize("device_count", [None, 1, 8, 256])
def test_the_defaults_on_drawn_pedestrians_pass(device_count):
    check(synthetic(), device_count)
    if device_count in (None, 1, 8):
        check(tiny_config(), device_count)


def test_every_setting_has_a_rule_or_needs_none():
    """A new setting goes into _RANGES or _CHOICES, or with a reason onto this list."""
    free = {
        # Any of these is a path or a name of the user's.
        *("data.path", "data.split", "init.torch_weights", "init.prefix", "eval.path"),
        # Booleans.
        *("pixel_predictor.use_self_attention", "feature_predictor.use_self_attention"),
        *("regions.same", "encoder.learned_positions", "init.fold_normalisation"),
        *("eval.centre_cameras", "loss.feature_instance_norm"),
        # Tuples, which have rules of their own.
        *("pixel_predictor.memory_blocks", "feature_predictor.memory_blocks"),
    }
    ruled = config_check.RANGES.keys() | config_check.CHOICES.keys()
    assert not ruled & free
    assert {path for path, _ in field_paths(Config())} == ruled | free


def test_defaults_lie_in_their_ranges_and_choices():
    fields = dict(field_paths(Config()))
    for path, (low, high) in config_check.RANGES.items():
        value = fields[path]
        for number in value if isinstance(value, tuple) else (value,):
            assert number is None or low <= number, path
            assert None in (number, high) or number <= high, path
    for path, choices in config_check.CHOICES.items():
        assert fields[path] in choices


@pytest.mark.parametrize("path", config_check.RANGES)
def test_numbers_out_of_range_are_refused_by_name(path):
    low, high = config_check.RANGES[path]
    kind = str(typing.get_type_hints(owner_of(path))[path.rpartition(".")[2]])
    values: list = [low - 1, 2**31 if high is None else high + 1]
    if "float" in kind:
        values += [math.nan, math.inf, -math.inf, 1e300]
    if "tuple" in kind:
        count = len(re.findall("int|float", kind))
        values = [(0.5,) * (count - 1) + (value,) for value in values]
        if "int" in kind:
            values = [(1, *value[1:]) for value in values]
    for value in values:
        text = problems(**{path.replace(".", "__"): value})
        assert text.count("\n") == 0, text
        assert f"config.{path}={value} is out of range: it must be" in text


def owner_of(path: str) -> type:
    """The dataclass whose field it is."""
    section = Config()
    for name in path.split(".")[:-1]:
        section = getattr(section, name)
    return type(section)


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("train.batch_size", 8.0, "int, but is float 8.0"),
        ("train.batch_size", True, "int, but is bool True"),
        ("train.batch_size", np.int64(8), r"int, but is int64 np.int64\(8\)"),
        ("train.batch_size", None, "int, but is NoneType None"),
        ("train.batch_size", "8", "int, but is str '8'"),
        ("train.steps", 7.5, r"int \| None, but is float 7.5"),
        ("optim.base_lr", np.float32(1), "float, but is float32"),
        ("optim.base_lr", False, "float, but is bool False"),
        ("regions.same", 1, "bool, but is int 1"),
        ("data.path", b"/x", r"str \| None, but is bytes"),
        ("data.mean", [0.5, 0.5, 0.5], "tuple.*, but is list"),
        ("data.mean", (0.5,), r"tuple.*, but is tuple \(0.5,\)"),
        ("encoder.pos_embed_grid", (8.0, 4), "tuple.*, but is tuple"),
        ("pixel_predictor.memory_blocks", ("-1",), "tuple.*, but is tuple"),
        ("masks.kind", 3, "str, but is int 3"),
        ("optim", None, "OptimConfig, but is NoneType None"),
        ("optim", {"lr": 1.0}, "OptimConfig, but is dict"),
    ],
)
def test_every_value_is_of_the_type_of_its_field(path, value, wanted):
    text = problems(**{path.replace(".", "__"): value})
    assert re.fullmatch(rf"config.{path} must be of type {wanted}.*", text), text


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_file_can_have_is_refused(path):
    assert "holds what no name of a file can hold" in problems(
        data__path=path, data__source="folder"
    )
    check(folder_at("\udcff"))  # how Python reads a name that is not UTF-8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data__path": "x"}, "config.data.path=x is not read with data.source"),
        ({"eval__path": "x"}, "config.eval.path is scored every config.eval.every_st"),
        ({"init__prefix": "a"}, "config.init has settings of a file that is not named"),
        ({"eval__layout": "msmt17"}, "is of the folder config.eval.path, which is mi"),
        ({"optim__lr": 0.1, "optim__base_lr": 0.2}, "base_lr has no effect"),
    ],
)
def test_a_setting_that_another_one_makes_useless_is_refused(fields, words):
    assert words in problems(**{"eval__every_steps": 0} | fields)


class Evil(float):
    """What a stranger's config file may hold: all that it does raises."""

    def __repr__(self):
        raise SystemExit(0)

    __str__ = __format__ = __eq__ = __lt__ = __le__ = __repr__
    __hash__ = None


@pytest.mark.parametrize(
    ("path", "value", "kind"),
    [
        ("train.batch_size", Evil(), "Evil of a text that raises SystemExit"),
        ("optim.base_lr", Evil(), "Evil of a text that raises SystemExit"),
        ("data.mean", (Evil(),) * 3, "tuple of a text that raises SystemExit"),
        ("data.path", 10**5000, "int of a text that raises ValueError"),
        ("masks.kind", np.zeros((2, 2)), r"ndarray array\(.*"),
    ],
    ids=["number", "float", "tuple", "long", "lines"],  # pytest's own would be theirs
)
def test_a_value_that_has_no_text_is_refused_in_a_sentence(path, value, kind):
    text = problems(**{path.replace(".", "__"): value})
    assert re.fullmatch(rf"config.{path} must be of type .*, but is {kind}", text), text


def test_a_number_too_long_to_be_written_is_refused_in_a_sentence():
    text = problems(train__steps=10**5000)
    assert text.startswith("config.train.steps=of a text that raises ValueError is out")


def test_a_setting_that_a_config_file_deleted_is_refused():
    cfg = synthetic()
    del cfg.encoder.width
    with pytest.raises(ConfigError, match="encoder.width must be of type int, but is"):
        check(cfg)


def test_whole_numbers_stand_for_floats_and_none_where_it_may():
    cfg = synthetic()
    cfg.optim.base_lr, cfg.train.epochs, cfg.optim.clip_norm = 1, 3, None
    cfg.loss.pixel_weight = np.float64(0.5)  # a float, and JSON knows it
    check(cfg)


@pytest.mark.parametrize("path", config_check.CHOICES)
def test_unknown_choices_are_refused_with_the_nearest_one(path):
    choice = config_check.CHOICES[path][-1]
    text = problems(**{path.replace(".", "__"): choice[:-1]})
    assert f"config.{path}='{choice[:-1]}' is not one of" in text
    assert f"did you mean --config.{path}={choice}?" in text


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"data__height": 250},
            "config.data.height=250 is not a multiple of config.encoder.patch_size=16; "
            "use e.g. 240",
        ),
        ({"data__width": 8}, "config.data.width=8 .* use e.g. 16"),
        (
            {"encoder__width": 770},
            "config.encoder.width=770 is not a multiple of num_heads=12 and of 4 .* "
            "use e.g. 768",
        ),
        (
            {"pixel_predictor__num_heads": 7},
            "pixel_predictor.width=512 .* use e.g. 504",
        ),
        ({"feature_predictor__width": 6}, "feature_predictor.width=6 .* use e.g. 12"),
        ({"pixel_predictor__memory_blocks": ()}, r"memory_blocks=\(\) must name one"),
        ({"pixel_predictor__memory_blocks": (-1, 12)}, r"-12 \.\. 11"),
        ({"feature_predictor__memory_blocks": (-1, 11)}, "none twice"),
        (
            {"regions__min_nested_area": 0.9},
            "regions.min_nested_area=0.9 exceeds max_nested_area=0.8",
        ),
        (
            {"encoder__depth": 1, "feature_predictor__memory_blocks": (-1,)},
            r"memory_blocks=\(0, -1\) .*none twice; use .*\(-1,\)",
        ),
        (
            {"loss__feature_weight": 0.0, "pixel_predictor__memory_blocks": (0,)},
            "no predictor reads the encoder's last block",
        ),
        (
            {"loss__pixel_weight": 0.0, "feature_predictor__memory_blocks": (3,)},
            "no predictor reads the encoder's last block",
        ),
        (
            {"loss__pixel_weight": 0.0, "loss__feature_weight": 0.0},
            "both 0: no patch of RegionB",
        ),
        (
            {"init__fold_normalisation": True},
            "of a file that is not named; name one with --config.init.torch_weights=F",
        ),
        ({"init__grid": (0, 8)}, r"init.grid=\(0, 8\) is out of range"),
        ({"encoder__pos_embed_grid": (0, 0)}, r"grid=\(0, 0\) is out of range"),
        ({"data__height": 2**14, "data__width": 2**14}, "make 1048576 patches"),
        ({"encoder__width": 65532, "encoder__depth": 250}, "make 1e[+]13 weights"),
        ({"regions__min_area": 0.9, "regions__max_area": 0.8}, "min_area=0.9 exceeds"),
        ({"regions__min_aspect": 2.0}, "regions.min_aspect=2.0 exceeds max_aspect"),
        ({"masks__min_aspect": 9.0}, "masks.min_aspect=9.0 exceeds max_aspect=3.3"),
        ({"masks__ratio": 0.0}, "hides 0 of 128 patches; at least one"),
        ({"masks__ratio": 1.0}, "hides 128 of 128 patches; at least one"),
        ({"data__source": "tfds"}, "no data: give --config.data.path=DIR"),
        ({"data__source": "folder"}, "no data: give --config.data.path=DIR"),
        ({"data__std": (0.2, 0.0, 0.2)}, r"data.std=.* must be in 0.001 .. 1"),
        ({"data__mean": (0.5, math.nan, 0.5)}, "data.mean=.* must be in 0 .. 1"),
        ({"data__mean": (123.7, 116.3, 103.5)}, "data.mean=.* must be in 0 .. 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(fields, sentence):
    text = problems(**fields)
    assert text.count("\n") == 0, text
    with pytest.raises(ConfigError, match=sentence):
        raise ConfigError(text)


def test_every_wrong_setting_is_said_at_once():
    text = problems(optim__beta1=2.0, masks__kind="blok", train__accumulate=0)
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "nearest"),
    [(4095, 1, 4088), (4096, 3, 4080), (3, 1, 8)],
)
def test_a_batch_that_does_not_split_is_refused_with_one_that_does(
    batch_size, accumulate, nearest
):
    fields = {"train__batch_size": batch_size, "train__accumulate": accumulate}
    text = problems(8, **fields)
    assert f"use a multiple of {8 * accumulate}, e.g. " in text
    assert text.endswith(f"--config.train.batch_size={nearest}")
    check_again = synthetic()
    check_again.train.batch_size, check_again.train.accumulate = nearest, accumulate
    check(check_again, 8)


def test_the_size_of_a_predictor_that_is_off_does_not_matter():
    cfg = synthetic()
    cfg.loss.feature_weight, cfg.feature_predictor.width = 0.0, 6
    check(cfg)


@pytest.mark.parametrize("sizes", [(-1, 3), (-1, 16), (4, 1), (8, 2), (0, 8)])
def test_a_mesh_of_other_than_all_devices_is_refused_with_one_that_fits(sizes):
    data, fsdp = sizes
    text = problems(8, mesh__data=data, mesh__fsdp=fsdp)
    assert text.startswith(f"config.mesh: data={data} x fsdp={fsdp} do not make the 8")
    fits = synthetic()
    fits.mesh.fsdp = int(text.rpartition("=")[2])
    check(fits, 8)


@pytest.mark.parametrize("sizes", [(-1, 1), (-1, 4), (2, 4), (1, 8), (8, 1)])
def test_a_mesh_of_all_devices_passes(sizes):
    cfg = synthetic()
    cfg.mesh.data, cfg.mesh.fsdp = sizes
    check(cfg, 8)
