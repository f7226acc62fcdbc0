"""Every setting of fine-tuning that cannot train is refused with one sentence."""

import json

import pytest
from finetuning import tiny_finetuning

from personmae_jax import config_check, config_finetune
from personmae_jax.config_finetune import FinetuneConfig, check_finetuning
from personmae_jax.config_json import config_from_json, config_to_json
from personmae_jax.config_values import field_paths
from personmae_jax.errors import ConfigError

ELSEWHERE = {"eval.layout": "occluded_whole", "eval.path": "Occluded_REID"}


def changed(fields: dict) -> FinetuneConfig:
    cfg = tiny_finetuning()
    for path, value in fields.items():
        *sections, leaf = path.split(".")
        section = cfg
        for name in sections:
            section = getattr(section, name)
        setattr(section, leaf, value)
    return cfg


def test_the_defaults_pass_once_there_is_data():
    cfg = FinetuneConfig()
    with pytest.raises(ConfigError, match="no data: give --config.data.path=DIR"):
        check_finetuning(cfg)
    cfg.data.path = "Market-1501"
    check_finetuning(cfg)
    check_finetuning(tiny_finetuning())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampling.images": 1}, "images=1 is out of range"),
        ({"head.drop_path": 1.0}, "must be in 0 .. 0.99"),
        ({"data.layout": "market"}, "did you mean --config.data.layout=market1501"),
        ({"data.height": 36}, "is not a multiple of"),
        ({"encoder.width": 18}, "is not a multiple of num_heads=2"),
        ({"augment.erase_min_area": 0.5}, "erase_min_area exceeds erase_max_area"),
        ({"loss.identity_weight": 0.0, "loss.triplet_weight": 0.0}, "are both 0"),
        ({"train.epochs": float("nan")}, "is out of range"),
        ({"data.std": (0.0, 1.0, 1.0)}, "must be in 0.001 .. 1"),
        ({"eval.layout": "occluded_whole"}, "config.eval.path, which is missing"),
        ({"eval.layout": "market", "eval.path": "x"}, "is not one of market1501"),
        (ELSEWHERE | {"head.use_cameras": True}, "cameras of config.eval.path are not"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(fields, words):
    with pytest.raises(ConfigError, match=words):
        check_finetuning(changed(fields))


def test_a_batch_that_does_not_split_is_told_by_the_names_it_has_here():
    config_finetune.check_finetuning(tiny_finetuning(), 8)
    with pytest.raises(ConfigError, match=r"4 identities x 4 images do not split over"):
        config_finetune.check_finetuning(tiny_finetuning(), 3)


def test_every_setting_has_a_rule_or_needs_none():
    free = {
        *("init.workdir", "init.torch_weights", "init.fold_normalisation"),
        *("init.prefix", "init.grid"),
        *("data.path", "data.query_camera", "head.use_cameras"),
        "eval.path",
    }
    ruled = config_finetune._RANGES.keys() | config_finetune._CHOICES.keys()
    # These have the rules of pretraining, under the same names.
    shared = config_check.RANGES.keys() | config_check.CHOICES.keys()
    shared |= {"encoder.learned_positions", "encoder.pos_embed_grid"}
    paths = {path for path, _ in field_paths(FinetuneConfig())}
    assert ruled | free <= paths
    assert paths <= ruled | free | shared


def test_the_settings_survive_json_with_their_kind():
    cfg = changed({"optim.clip_norm": 1.0, "encoder.pos_embed_grid": (8, 4)})
    back = config_from_json(config_to_json(cfg))
    assert type(back) is FinetuneConfig
    assert back == cfg


def test_a_run_of_before_there_was_another_data_set_to_score_is_scored_by_its_own():
    tree = json.loads(config_to_json(changed(ELSEWHERE)))
    del tree["eval"]["layout"], tree["eval"]["path"]
    assert config_from_json(json.dumps(tree)) == tiny_finetuning()
