"""What is drawn for the rows of a batch: random numbers, and which record.

Both are functions of (seed, position), so a row is the same whatever it is drawn
together with; and both are made for all rows at once, since one call of numpy for
every row would take a tenth of an image's time.
"""

import enum
import math

import numpy as np
from jaxtyping import Float64, Int64


class Stream(enum.IntEnum):
    """What random numbers are for; streams are independent of each other."""

    REGIONS = 0
    PATCHES = 1
    BLOCKS = 2  # and all up to the next: one for every further block
    BESIDE_BLOCKS = 2**32


class BatchRng:
    """Random numbers for positions; those of one depend on no other."""

    def __init__(self, seed: int, positions: range):
        """Prepares the streams of `positions`, whose step may be the number of hosts.

        The numbers of those between are made too and thrown away: 5 ns each.
        """
        self._seed = seed
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def uniform(self, stream: int, num: int) -> Float64[np.ndarray, "b {num}"]:
        """The first numbers of a stream, uniform in [0, 1): `num` for each position.

        Philox turns (key, counter) into four numbers: the key is (seed, stream), and
        every position has counters of its own.

        Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
        """
        blocks = math.ceil(num / 4)
        key = np.array((self._seed, stream), np.uint64)
        philox = np.random.Philox(counter=self._positions.start * blocks, key=key)
        span = self._positions.stop - self._positions.start
        numbers = np.random.Generator(philox).random((span, 4 * blocks))
        return numbers[:: self._positions.step, :num]


class RecordOrder:
    """The records of an endless stream of epochs, each a permutation of its own.

    A Feistel network permutes pairs of digits (left, right), both below
    ceil(sqrt(num_records)): every round adds to the left digit a random function of
    the right one, and swaps them. Pairs beyond the last record are permuted again
    until they are below it. So nothing grows with the number of records but tables
    of its square root; numpy's own permutation would hold 33 MB for 4 million.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002).
    """

    _NUM_ROUNDS = 8  # 4 suffice for large sets (Luby and Rackoff)

    def __init__(self, num_records: int, seed: int):
        self._num_records = num_records
        self._seed = seed
        self._side = math.isqrt(num_records - 1) + 1

    def records(self, positions: range) -> Int64[np.ndarray, " b"]:
        """The record drawn at every position."""
        place = np.arange(
            positions.start, positions.stop, positions.step, dtype=np.int64
        )
        epochs, records = np.divmod(place, self._num_records)
        for epoch in range(epochs[0], epochs[-1] + 1):
            is_in_epoch = epochs == epoch
            records[is_in_epoch] = self._permute(records[is_in_epoch], epoch)
        return records

    def _permute(
        self, places: Int64[np.ndarray, " n"], epoch: int
    ) -> Int64[np.ndarray, " n"]:
        rng = np.random.default_rng((self._seed, epoch))
        tables = rng.integers(self._side, size=(self._NUM_ROUNDS, self._side))
        places = self._encipher(places, tables)
        while (is_beyond := places >= self._num_records).any():
            places[is_beyond] = self._encipher(places[is_beyond], tables)
        return places

    def _encipher(
        self, places: Int64[np.ndarray, " n"], tables: Int64[np.ndarray, "rounds side"]
    ) -> Int64[np.ndarray, " n"]:
        left, right = np.divmod(places, self._side)
        for table in tables:
            left, right = right, (left + table[right]) % self._side
        return left * self._side + right
