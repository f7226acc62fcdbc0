"""Promises about the account of images that cannot be used."""

import numpy as np
import pytest
from absl import logging

from personmae_jax.data.bad_records import BadRecords
from personmae_jax.data.images import Outcome
from personmae_jax.errors import RunError


class _Twenty:
    """Names of twenty records; nothing here reads them."""

    def __len__(self):
        return 20

    def read(self, index):
        raise NotImplementedError

    def name(self, index):
        return f"picture {index}"


def test_bad_and_converted_records_are_counted_and_named_once(monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: lines.append(text % args)
    )
    account = BadRecords(_Twenty(), max_fraction=0.1)
    outcome = np.array(
        [Outcome.PLAIN, Outcome.EMPTY, Outcome.CMYK, Outcome.EMPTY], np.int8
    )
    counts = account.count(np.array([4, 5, 6, 5]), outcome)
    assert counts == {"bad_images": 2, "converted_images": 1}
    assert account.count(np.array([5, 5, 5, 5]), outcome)["bad_images"] == 2
    assert len(lines) == 1
    assert "picture 5 (empty)" in lines[0]


def test_too_many_bad_records_end_the_run_with_the_list():
    account = BadRecords(_Twenty(), max_fraction=0.1)
    empty = np.full(1, Outcome.EMPTY, np.int8)
    account.count(np.array([0]), empty)
    account.count(np.array([1]), np.full(1, Outcome.TRUNCATED, np.int8))
    with pytest.raises(RunError, match="3 of 20 images are bad") as caught:
        account.count(np.array([2]), empty)
    message = str(caught.value)
    assert "picture 0 (empty), picture 1 (truncated), picture 2 (empty)" in message
    assert "config.data.max_bad_fraction=0.1" in message
    # A long list is cut.
    with pytest.raises(RunError, match="and 10 more"):
        BadRecords(_Twenty(), max_fraction=0.5).count(
            np.arange(30), np.full(30, Outcome.EMPTY, np.int8)
        )
