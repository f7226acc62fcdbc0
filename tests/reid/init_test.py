"""Promises about what fine-tuning starts from."""

import exported
import jax
import numpy as np
import pytest
from finetuning import start, tiny_finetuning

from personmae_jax.errors import ConfigError
from personmae_jax.reid import init


def test_a_run_brings_its_architecture_statistics_and_weights(tmp_path):
    cfg, source = tiny_finetuning(), exported.small_config()
    source.data.mean, source.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    params, found, notes = start(cfg, source, tmp_path)
    assert cfg.encoder == source.encoder
    assert (cfg.data.mean, cfg.data.std) == (source.data.mean, source.data.std)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert notes == (f"Encoder from {tmp_path / 'source'}, student at step 3.",)


def test_camera_embeddings_that_stay_behind_are_told(tmp_path):
    cfg, source = tiny_finetuning(), tiny_finetuning()
    source.head.use_cameras = True
    _, _, (note,) = start(cfg, source, tmp_path)
    assert "WARNING: it was fine-tuned with camera embeddings, which stay" in note


def test_another_input_size_keeps_the_coordinates_of_the_codes(tmp_path):
    cfg, source = tiny_finetuning(), exported.small_config()  # 8 x 4 patches of 4
    cfg.data.height = 48
    _, _, notes = start(cfg, source, tmp_path)
    assert cfg.encoder.pos_embed_grid == (8, 4)
    assert cfg.grid == (12, 4)
    assert "8 x 4 positions are read at 12 x 4" in notes[0]


def test_a_learned_table_is_resampled_to_another_input_size(tmp_path):
    cfg, source = tiny_finetuning(), exported.small_config()
    source.encoder.learned_positions = True
    table = np.arange(33 * 32, dtype=np.float32).reshape(1, 33, 32)
    params = exported.trained_like(source.encoder) | {"pos_embed": table}
    exported.make_run(tmp_path / "source", source, {3: (params, params)})
    cfg.init.workdir, cfg.data.height = str(tmp_path / "source"), 48
    init.settle(cfg, str(tmp_path / "new"))
    found, _ = init.read_encoder(cfg)
    assert found["pos_embed"].shape == (1, 49, 32)
    np.testing.assert_array_equal(found["pos_embed"][:, 0], table[:, 0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"workdir": "nowhere"}, "nowhere holds no run"),
        ({"torch_weights": "nowhere.pth"}, "nowhere.pth"),
        ({"workdir": "a", "torch_weights": "b"}, "names both a run"),
    ],
)
def test_a_start_that_is_not_there_is_told_before_any_work(tmp_path, fields, words):
    cfg = tiny_finetuning()
    for name, value in fields.items():
        setattr(cfg.init, name, value)
    with pytest.raises(ConfigError, match=words):
        init.settle(cfg, str(tmp_path / "new"))


def test_a_missing_checkpoint_of_the_other_run_is_told_before_any_work(tmp_path):
    cfg = tiny_finetuning()
    cfg.init.step = 7
    with pytest.raises(ConfigError, match="no whole checkpoint of step 7"):
        start(cfg, exported.small_config(), tmp_path)
