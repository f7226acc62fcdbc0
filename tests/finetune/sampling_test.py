"""Promises about training batches: who is in them, in which images, on which host."""

import copy
import pickle

import numpy as np
import pytest
from finetuning import tiny_finetuning, tiny_people

from personmae_jax.config_finetune import SamplingConfig
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.finetune import sampling
from personmae_jax.finetune.sampling import FinetuneBatches, IdentitySampler
from personmae_jax.reid.datasets import open_scored

# Of 7 identities; the third has fewer than K = 4, the last just as many.
COUNTS = (8, 9, 3, 17, 5, 12, 4)
LABELS = np.repeat(np.arange(7), COUNTS)
PASS = 3  # batches of 2 identities; one of 7 is left out


def sampler(seed: int = 0, **changes) -> IdentitySampler:
    given = {"identities": 2, "images": 4} | changes
    return IdentitySampler(LABELS, SamplingConfig(**given), seed)


def test_a_batch_is_p_identities_of_k_images_side_by_side():
    one = sampler()
    for step in range(50):
        people = LABELS[one.batch(step)].reshape(2, 4)
        assert (people == people[:, :1]).all()
        assert len(set(people[:, 0])) == 2


def test_every_identity_comes_once_in_a_pass_but_for_those_left_over():
    one, left_out = sampler(), set()
    for number in range(40):
        steps = range(number * PASS, (number + 1) * PASS)
        people = [int(p) for step in steps for p in LABELS[one.batch(step)][::4]]
        assert len(people) == len(set(people)) == 6
        left_out |= set(range(7)) - set(people)
    assert left_out == set(range(7))  # nobody is always, or never, left out


def test_no_image_comes_twice_in_a_batch_unless_there_are_too_few():
    one = sampler()
    for step in range(60):
        rows = one.batch(step).reshape(2, 4)
        for images in rows:
            count = COUNTS[LABELS[images[0]]]
            times = np.unique(images, return_counts=True)[1]
            assert len(times) == min(count, 4)
            assert times.max() - times.min() <= (count < 4)


def test_a_round_shows_an_identity_s_images_once_before_it_begins_anew():
    one = IdentitySampler(
        np.repeat([0, 1], 8), SamplingConfig(identities=2, images=4), seed=3
    )
    for start in range(0, 20, 2):
        rows = np.concatenate([one.batch(start), one.batch(start + 1)])
        assert sorted(rows) == list(range(16))


def test_every_image_is_trained_on():
    seen = np.concatenate([sampler().batch(step) for step in range(150)])
    assert set(seen) == set(range(len(LABELS)))


def test_the_seed_and_nothing_else_decides():
    steps = [17, 3, 120]
    first = [sampler().batch(step) for step in steps]
    again = [sampler().batch(step) for step in reversed(steps)][::-1]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, [sampler(seed=1).batch(step) for step in steps])


def equal(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def batches() -> FinetuneBatches:
    return FinetuneBatches(tiny_people(), tiny_finetuning())


def test_a_batch_tells_who_is_in_it_and_which_camera_saw_them(batches):
    people, batch = tiny_people(), batches[2]
    train = people.train[batches._sampler.batch(2)]
    names = np.unique(people.identities[people.train])
    np.testing.assert_array_equal(names[batch["label"]], people.identities[train])
    np.testing.assert_array_equal(batch["camera"], people.cameras[train])
    assert batch["image"].shape == (16, 32, 16, 3)
    assert len({image.tobytes() for image in batch["image"]}) > 8


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_share_the_rows_of_the_same_global_batch(batches, num_hosts):
    whole = batches[3]
    for host in range(num_hosts):
        part = FinetuneBatches(
            tiny_people(), tiny_finetuning(), host=host, num_hosts=num_hosts
        )[3]
        assert equal(
            part, {name: rows[host::num_hosts] for name, rows in whole.items()}
        )


def test_a_stream_may_begin_anywhere_and_travel_to_a_worker(batches):
    stream = pickle.loads(pickle.dumps(batches)).iterate(2, 4)
    assert equal(next(stream), batches[2])
    assert equal(next(stream), batches[3])
    stream.close()


def test_an_image_that_cannot_be_used_is_named_not_replaced():
    people = copy.copy(tiny_people())

    class Broken:
        def __len__(self):
            return len(people.identities)

        def read(self, index):
            return b"no image"

        def name(self, index):
            return f"file {index}"

    object.__setattr__(people, "records", Broken())
    with pytest.raises(RunError, match=r"file \d+ cannot be used \(not an image"):
        FinetuneBatches(people, tiny_finetuning())[0]
    stream = FinetuneBatches(people, tiny_finetuning()).iterate(0, 2)
    with pytest.raises(RunError, match=r"file \d+ cannot be used"):
        next(stream)
    stream.close()


def open_with(**settings):
    return sampling.open_training(configured(**settings))


def configured(**settings):
    cfg = tiny_finetuning()
    cfg.data.synthetic_train = 8
    for path, value in settings.items():
        section, leaf = path.split("__")
        setattr(getattr(cfg, section), leaf, value)
    return cfg


def test_more_identities_in_a_batch_than_there_are_is_refused():
    assert len(open_with().train) == 32
    with pytest.raises(ConfigError, match="exceeds the 8 identities that 10 synthetic"):
        open_with(sampling__identities=9)


def market(root, train: list[str], query: list[str], gallery: list[str]):
    parts = {"bounding_box_train": train, "query": query, "bounding_box_test": gallery}
    for folder, names in parts.items():
        (root / folder).mkdir()
        for name in names:
            (root / folder / f"{name}_x.jpg").touch()
    return {
        "data__layout": "market1501",
        "data__path": str(root),
        "sampling__identities": 2,
    }


TRAIN = ["0001_c1_1", "0001_c2_1", "0002_c1_1", "0002_c2_1"]
TEST = {"query": ["0003_c1_1"], "gallery": ["0003_c2_1", "0004_c1_1"]}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train": []}, "has no images to train on"),
        ({"query": []}, "has no query image"),
        ({"gallery": ["0009_c2_1"]}, "no identity of the query is in the gallery"),
        ({"gallery": ["0003_c1_1"]}, "every image is of camera 1"),
        ({"train": ["hello"]}, "tell no identity and camera"),
    ],
)
def test_a_folder_that_cannot_teach_or_test_is_refused(tmp_path, parts, words):
    with pytest.raises(ConfigError, match=words):
        open_with(**market(tmp_path, **{"train": TRAIN, **TEST, **parts}))


def test_camera_embeddings_want_every_camera_of_the_test_in_training(tmp_path):
    parts = {"train": TRAIN, **TEST} | {"gallery": ["0003_c7_1"]}
    settings = market(tmp_path, **parts)
    assert len(open_with(**settings).train) == 4
    with pytest.raises(ConfigError, match="is of camera 7, so their embeddings"):
        open_with(**settings, head__use_cameras=True)


def test_training_data_need_no_query_where_another_data_set_scores(tmp_path):
    settings = market(tmp_path, train=TRAIN, query=[], gallery=[])
    for folder in ("occluded_body_images", "whole_body_images"):
        (tmp_path / "people" / folder / "001").mkdir(parents=True)
        (tmp_path / "people" / folder / "001" / "001_01.tif").touch()
    cfg = configured(
        **settings,
        eval__layout="occluded_whole",
        eval__path=str(tmp_path / "people"),
    )
    dataset = sampling.open_training(cfg)
    assert len(dataset.train) == 4
    assert not len(dataset.query)
    scored = open_scored(cfg.eval.layout, cfg.eval.path)
    assert scored is not None
    assert (len(scored.query), len(scored.gallery)) == (1, 1)
    with pytest.raises(ConfigError, match="has no query image"):
        open_with(**settings)
