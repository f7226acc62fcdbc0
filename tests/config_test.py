"""Settings: their types, their paths, and what is derived from them."""

import dataclasses
import typing

import pytest
from tiny import tiny_config

from personmae_jax.config import Config, predictor_size
from personmae_jax.config_values import field_paths, nearest_field


def sections(cfg, name="config"):
    yield name, cfg
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            yield from sections(value, f"{name}.{field.name}")


def test_every_default_has_exactly_the_type_that_it_is_declared_with():
    """An int as default of a float setting would turn into a float in config.json."""
    for name, section in sections(Config()):
        for field, kind in typing.get_type_hints(type(section)).items():
            value = getattr(section, field)
            kinds = typing.get_args(kind) or (kind,)
            if isinstance(value, tuple):
                assert typing.get_origin(kind) is tuple, f"{name}.{field}"
            else:
                assert type(value) in kinds, f"{name}.{field}={value!r}"


def test_a_misspelt_setting_is_an_error_at_once():
    with pytest.raises(AttributeError):
        Config().optim.base_rl = 1.0


def test_two_configs_share_nothing():
    a, b = Config(), Config()
    a.optim.base_lr = a.pixel_predictor.width = 1
    assert b == Config()


def test_field_paths_name_every_leaf_once():
    paths = dict(field_paths(Config()))
    assert paths["optim.beta1"] == 0.9
    assert paths["data.synthetic.shots"] == 4
    count = sum(
        not dataclasses.is_dataclass(getattr(section, field.name))
        for _, section in sections(Config())
        for field in dataclasses.fields(section)
    )
    assert len(paths) == len(list(field_paths(Config()))) == count


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("optim.base_rl", "optim.base_lr"),
        ("optimizer.lr", "optim.lr"),
        ("train.batchsize", "train.batch_size"),
        ("encoder.heads", "encoder.num_heads"),
        ("batch_size", "train.batch_size"),
        ("model.depth", "encoder.depth"),
    ],
)
def test_nearest_field_finds_what_was_meant(misspelt, meant):
    assert nearest_field(dict(field_paths(Config())), misspelt) == meant


def test_the_default_grid_is_sixteen_by_eight_half_of_it_hidden():
    cfg = Config()
    assert (cfg.grid, cfg.num_patches, cfg.num_hidden) == ((16, 8), 128, 64)
    cfg.data.height = 384
    assert (cfg.grid, cfg.num_patches, cfg.num_hidden) == ((24, 8), 192, 96)


def test_a_predictor_takes_the_encoders_size_where_it_has_none():
    cfg = tiny_config()
    assert predictor_size(cfg.encoder, cfg.feature_predictor) == (16, 2)
    assert predictor_size(cfg.encoder, cfg.pixel_predictor) == (8, 2)


def test_the_defaults_are_those_of_the_method():
    """The table of the method, for whoever changes a default unawares."""
    cfg = Config()
    assert (cfg.encoder.width, cfg.encoder.depth, cfg.encoder.num_heads) == (
        768,
        12,
        12,
    )
    assert predictor_size(cfg.encoder, cfg.pixel_predictor) == (512, 8)
    assert cfg.pixel_predictor.memory_blocks == (0, -1)
    assert predictor_size(cfg.encoder, cfg.feature_predictor) == (768, 12)
    assert cfg.feature_predictor.memory_blocks == (3, 7, -1)
    assert not cfg.pixel_predictor.use_self_attention
    assert not cfg.feature_predictor.use_self_attention
    assert (cfg.regions.min_area, cfg.regions.nested) == (0.8, 1.0)
    assert (cfg.loss.feature_blocks, cfg.loss.feature_instance_norm) == (6, True)
    assert cfg.loss.cls_weight == 0.02
    assert cfg.pixel_predictor.depth == cfg.feature_predictor.depth == 2
    assert (cfg.optim.beta1, cfg.optim.beta2) == (0.9, 0.95)
    assert (cfg.optim.weight_decay, cfg.optim.base_lr) == (0.05, 1.5e-4)
    assert (cfg.masks.ratio, cfg.masks.kind) == (0.5, "block")
    assert (cfg.train.batch_size, cfg.train.epochs) == (4096, 300.0)
