import dataclasses
import json

import pytest

from personmae_jax.config import Config, PredictorConfig, TrainConfig
from personmae_jax.config_json import (
    config_from_json,
    config_to_json,
    differences,
    dropped_settings,
)
from personmae_jax.errors import ConfigError


def changed() -> Config:
    """A config in which values of every kind differ from the default."""
    cfg = Config()
    cfg.pixel_predictor = PredictorConfig(width=None, memory_blocks=(0, 3, -1))
    cfg.train = TrainConfig(steps=7, seed=5)
    cfg.train.epochs = 2
    cfg.regions.same = True
    cfg.optim.clip_norm = 1.0
    cfg.data.mean = (0.1, 0.2, 0.3)
    return cfg


@pytest.mark.parametrize("cfg", [Config(), changed()])
def test_there_and_back_is_the_same_config_with_types(cfg):
    back = config_from_json(config_to_json(cfg))
    assert back == cfg
    assert type(back.train.epochs) is float
    assert type(back.data.mean) is tuple
    assert type(back.pixel_predictor.memory_blocks) is tuple


def edit(section: str, field: str, value) -> str:
    tree = json.loads(config_to_json(Config()))
    tree[section][field] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "no JSON object"),
        (edit("encoder", "widht", 3), "config.encoder.widht is unknown"),
        (edit("encoder", "width", "768"), 'config.encoder.width is "768"'),
        (edit("encoder", "width", True), "config.encoder.width is true"),
        (edit("data", "mean", [0.1, 0.2]), r"config.data.mean is \[0.1, 0.2\]"),
        (edit("data", "mean", [0.1, 0.2, "x"]), r'config.data.mean\[2\] is "x"'),
        (edit("data", "path", 3), "config.data.path is 3"),
        ('{"encoder": 3}', "config.encoder is 3"),
    ],
)
def test_what_this_code_did_not_write_is_refused_naming_the_field(text, message):
    with pytest.raises(ConfigError, match=message):
        config_from_json(text)


def test_what_is_missing_is_as_by_default():
    tree = json.loads(config_to_json(changed()))
    del tree["train"], tree["data"]["mean"], tree["pixel_predictor"]["memory_blocks"]
    expected = changed()
    expected.train, expected.data.mean = TrainConfig(), Config().data.mean
    expected.pixel_predictor.memory_blocks = Config().pixel_predictor.memory_blocks
    assert config_from_json(json.dumps(tree)) == expected


def test_a_run_made_before_a_setting_goes_on_as_it_was():
    """The defaults are others now; a run from before them has none of these fields."""
    tree = json.loads(config_to_json(Config()))
    del tree["regions"]["nested"]
    for field in ("feature_blocks", "feature_instance_norm", "cls_weight"):
        del tree["loss"][field]
    cfg = config_from_json(json.dumps(tree))
    assert isinstance(cfg, Config)
    assert cfg.regions.nested == 0
    assert (cfg.loss.feature_blocks, cfg.loss.feature_instance_norm) == (1, False)
    assert cfg.loss.cls_weight == 0


def test_a_field_that_had_another_name_is_read():
    cfg = Config()
    cfg.encoder.pos_embed_grid = (8, 4)
    text = config_to_json(cfg).replace('"pos_embed_grid"', '"code_grid"')
    assert config_from_json(text) == cfg


@pytest.mark.parametrize(
    ("section", "field", "default", "other"),
    [
        ("loss", "feature_loss", "mse", "cosine"),
        ("loss", "centre_momentum", None, 0.9),
        ("regions", "min_overlap", 0.0, 0.3),
        ("teacher", "schedule", "fraction", "absolute"),
    ],
)
def test_a_setting_that_is_gone_is_ignored_and_told_where_it_mattered(
    section, field, default, other, caplog
):
    assert config_from_json(edit(section, field, default)) == Config()
    assert not caplog.records
    assert not dropped_settings(edit(section, field, default))
    assert config_from_json(edit(section, field, other)) == Config()
    told = f"config.{section}.{field}={other!r}"
    assert f"{told} is no longer supported" in caplog.text
    assert dropped_settings(edit(section, field, other)) == [told]


def test_differences_name_every_field_that_is_not_equal():
    found = differences(Config(), changed())
    assert found["config.regions.same"] == "false there, true here"
    assert found["config.train.epochs"] == "300.0 there, 2 here"
    assert (
        found["config.data.mean"] == "[0.485, 0.456, 0.406] there, [0.1, 0.2, 0.3] here"
    )
    assert "config.encoder.width" not in found


def test_every_field_is_in_the_json():
    def count(cfg) -> int:
        values = (getattr(cfg, f.name) for f in dataclasses.fields(cfg))
        return sum(count(v) if dataclasses.is_dataclass(v) else 1 for v in values)

    text = config_to_json(Config())
    assert text.count('": ') - text.count('": {') == count(Config())


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("encoder", "width", 10**9),
        ("encoder", "pos_embed_grid", [0, 0]),
        ("data", "height", -16),
        ("masks", "kind", "stripes"),
        ("train", "steps", float("nan")),
    ],
)
def test_a_file_s_values_have_the_bounds_of_flags(section, field, value):
    tree = json.loads(config_to_json(Config()))
    tree[section][field] = value
    with pytest.raises(ConfigError, match=f"config.{section}.{field}"):
        config_from_json(json.dumps(tree))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("data", "height", 130), ("encoder", "num_heads", 5), ("data", "width", 2**17)],
)
def test_a_file_s_settings_make_an_encoder(section, field, value):
    tree = json.loads(config_to_json(Config()))
    tree[section][field] = value
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        config_from_json(json.dumps(tree))
