"""Every setting of training without labels that cannot train is refused."""

import dataclasses

import pytest
from unlabelled import tiny_unsupervised

from personmae_jax import config_check, config_unsupervised
from personmae_jax.config import Config
from personmae_jax.config_finetune import FinetuneConfig, FinetuneInitConfig
from personmae_jax.config_json import config_from_json, config_to_json
from personmae_jax.config_unsupervised import UnsupervisedConfig, check_unsupervised
from personmae_jax.config_values import field_paths
from personmae_jax.errors import ConfigError


def changed(fields: dict) -> UnsupervisedConfig:
    cfg = tiny_unsupervised()
    for path, value in fields.items():
        section, leaf = path.split(".")
        setattr(getattr(cfg, section), leaf, value)
    return cfg


def test_the_defaults_pass_once_there_is_data():
    cfg = UnsupervisedConfig()
    with pytest.raises(ConfigError, match="no data: give --config.data.path=DIR"):
        check_unsupervised(cfg)
    cfg.data.path = "Market-1501"
    check_unsupervised(cfg)
    check_unsupervised(tiny_unsupervised(), 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cluster.eps": 1.5}, "config.cluster.eps=1.5 is out of range"),
        ({"cluster.eps": 0.0}, "must be in 0.05 .. 0.8"),
        ({"cluster.k1": 4, "cluster.k2": 5}, "k2 exceeds k1"),
        ({"cluster.min_samples": 32}, "min_samples exceeds k1"),
        ({"eval.path": "x", "eval.every_rounds": 0}, "config.eval.path is scored"),
        ({"data.layout": "synthetic", "data.path": "x"}, "is not read with"),
        ({"head.feature": "patches"}, "is not one of cls, mean, stripes"),
        ({"data.layout": "image"}, "did you mean --config.data.layout=images"),
        ({"data.camera_folders": True}, "goes with data.layout=images"),
        ({"train.rounds": 0}, "train.rounds=0 is out of range"),
        ({"init.num_heads": 0}, "init.num_heads=0 is out of range"),
        ({"augment.erase_min_area": 0.5}, "erase_min_area exceeds erase_max_area"),
        ({"data.height": 36}, "is not a multiple of"),
        ({"eval.layout": "msmt17"}, "config.eval.path, which is missing"),
        ({"eval.layout": "market", "eval.path": "x"}, "is not one of market1501"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(fields, words):
    with pytest.raises(ConfigError, match=words):
        check_unsupervised(changed(fields))


def test_a_batch_that_does_not_split_is_told_by_the_names_it_has_here():
    with pytest.raises(ConfigError, match="4 clusters x 4 images do not split over 3"):
        check_unsupervised(tiny_unsupervised(), 3)


def test_every_setting_has_a_rule_or_needs_none():
    free = {f"init.{field.name}" for field in dataclasses.fields(FinetuneInitConfig)}
    free -= {f"init.{name}" for name in ("weights", "step", "num_heads", "mean", "std")}
    free |= {
        *("data.path", "data.query_camera", "data.camera_folders"),
        *("memory.camera_proxies", "sampling.across_cameras"),
        *("cluster.centre_cameras", "eval.path"),
    }
    ruled = config_unsupervised._RANGES.keys() | config_unsupervised._CHOICES.keys()
    # These have the rules of pretraining, under the same names.
    shared = config_check.RANGES.keys() | config_check.CHOICES.keys()
    shared |= {"encoder.learned_positions", "encoder.pos_embed_grid"}
    paths = {path for path, _ in field_paths(UnsupervisedConfig())}
    assert ruled | free <= paths
    assert paths <= ruled | free | shared


@pytest.mark.parametrize("kind", [Config, FinetuneConfig, UnsupervisedConfig])
def test_the_three_kinds_of_settings_are_told_apart_in_json(kind):
    back = config_from_json(config_to_json(kind()))
    assert type(back) is kind
    assert back == kind()


def test_the_settings_survive_json():
    cfg = changed({"optim.clip_norm": 1.0, "cluster.eps": None})
    assert config_from_json(config_to_json(cfg)) == cfg
