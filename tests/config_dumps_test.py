"""What a change of a default or a name does to every config shows in the diff."""

import runpy

import goldens
import pytest

from personmae_jax.config_check import check
from personmae_jax.config_finetune import FinetuneConfig, check_finetuning
from personmae_jax.config_json import config_from_json
from personmae_jax.config_unsupervised import UnsupervisedConfig, check_unsupervised
from personmae_jax.errors import ConfigError

SCRIPT = runpy.run_path(str(goldens.GOLDEN / "make_config_dumps.py"))
DUMPS = SCRIPT["dumps"]()
RENEW = "if this change is meant: PYTHONPATH=. python tests/golden/make_config_dumps.py"


@pytest.mark.parametrize("name", DUMPS)
def test_the_dump_in_the_repository_is_current(name):
    path = goldens.GOLDEN / name
    assert path.exists(), RENEW
    assert DUMPS[name] == path.read_text(encoding="utf-8"), RENEW


def test_no_dump_is_left_of_a_config_that_is_gone():
    present = {f"configs/{p.name}" for p in (goldens.GOLDEN / "configs").iterdir()}
    assert present == DUMPS.keys() - {"param_names.txt"}


@pytest.mark.parametrize("path", sorted(SCRIPT["CONFIGS"].glob("*.py")), ids=str)
def test_every_config_passes_its_check_once_it_has_data(path):
    cfg = SCRIPT["load_config"](path)
    refuse = {
        FinetuneConfig: check_finetuning,
        UnsupervisedConfig: check_unsupervised,
    }.get(type(cfg), check)
    source = cfg.data.source if refuse is check else cfg.data.layout
    if source != "synthetic" and cfg.data.path is None:
        with pytest.raises(ConfigError, match="no data"):
            refuse(cfg)
        cfg.data.path = "DIR"
    refuse(cfg)


@pytest.mark.parametrize("name", [n for n in DUMPS if n.endswith(".json")])
def test_a_dump_is_read_back_as_the_same_config(name):
    path = SCRIPT["CONFIGS"] / name.removeprefix("configs/").replace(".json", ".py")
    assert config_from_json(DUMPS[name]) == SCRIPT["load_config"](path)


@pytest.mark.parametrize("name", ["vits", "vitb", "vitl"])
def test_a_long_run_encodes_as_many_tokens_as_a_tpu_holds_without_padding(name):
    cfg = SCRIPT["load_config"](SCRIPT["CONFIGS"] / f"{name}.py")
    assert (1 + cfg.num_patches - cfg.num_hidden) % 8 == 0


def test_weight_decay_is_on_matrices_and_nothing_else():
    for line in DUMPS["param_names.txt"].splitlines():
        name, shape, *decay = line.split()
        is_matrix = name.endswith("/kernel")
        assert bool(decay) == is_matrix == (shape.count("x") == 1), line
