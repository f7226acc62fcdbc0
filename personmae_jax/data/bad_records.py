"""The account of images that cannot be used, kept where batches are consumed."""

import numpy as np
from absl import logging
from jaxtyping import Int8, Int64

from personmae_jax.data.images import Outcome
from personmae_jax.data.records import Records
from personmae_jax.errors import RunError

_NUM_NAMED = 20


class BadRecords:
    """Counts bad and converted records, names each bad one once, stops at too many."""

    def __init__(self, records: Records, max_fraction: float):
        """Starts empty; `count` raises above this fraction of distinct bad records."""
        self._records = records
        self._max_fraction = max_fraction
        self._outcomes: dict[int, Outcome] = {}  # of the distinct bad records

    def count(
        self, record: Int64[np.ndarray, " b"], outcome: Int8[np.ndarray, " b"]
    ) -> dict[str, int]:
        """Takes note of the records drawn for one batch, and of what became of each.

        Returns:
          `bad_images` (replaced by others) and `converted_images` of this batch.

        Raises:
          RunError: Too many distinct records have been bad so far; it lists them.
        """
        outcomes = [Outcome(value) for value in outcome.tolist()]
        for index, reason in zip(record.tolist(), outcomes, strict=True):
            if reason.is_bad and index not in self._outcomes:
                self._outcomes[index] = reason
                named = describe_bad(self._records, [(index, reason)])
                logging.warning("replaced a bad image: %s", named)
        if len(self._outcomes) > self._max_fraction * len(self._records):
            raise RunError(
                f"{len(self._outcomes)} of {len(self._records)} images are bad, more "
                f"than config.data.max_bad_fraction={self._max_fraction:g} allows: "
                f"{describe_bad(self._records, list(self._outcomes.items()))}; put "
                "good ones in their places or raise the limit; without them it is "
                "other data, which takes another --workdir"
            )
        return {
            "bad_images": sum(one.is_bad for one in outcomes),
            "converted_images": sum(one.is_converted for one in outcomes),
        }


def describe_bad(records: Records, bad: list[tuple[int, Outcome]]) -> str:
    """The first 20 records by name, each with its reason."""
    named = [
        f"{records.name(index)} ({outcome.reason})"
        for index, outcome in bad[:_NUM_NAMED]
    ]
    more = len(bad) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
