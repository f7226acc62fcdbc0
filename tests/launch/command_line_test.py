"""What all launchers do with arguments, paths and output."""

import pathlib
import sys

import pytest

from personmae_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import command_line  # noqa: E402

BLOCKS = "--config.pixel_predictor.memory_blocks"


@pytest.mark.parametrize(
    "given", [(f"{BLOCKS}=(0,)", f"{BLOCKS}=(-1,)"), (BLOCKS, "(0,)", BLOCKS, "(-1,)")]
)
def test_of_a_setting_given_twice_the_last_one_counts(given):
    argv = ["run", "--config=x.py", *given, "--config.train.steps=3"]
    kept = command_line._last_of_each_setting(argv)
    assert kept == [argv[0], argv[1], f"{BLOCKS}=(-1,)", "--config.train.steps=3"]


def test_an_empty_tuple_is_refused_rather_than_ignored():
    with pytest.raises(ConfigError, match="memory_blocks=.. is empty"):
        command_line._last_of_each_setting(["run", f"{BLOCKS}=()"])


def test_an_unknown_setting_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"did you mean --config.train.batch_size\?"):
        command_line._last_of_each_setting(["run", "--config.train.batchsize=3"])
