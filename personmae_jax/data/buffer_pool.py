"""Memory of batches that is used again: a pool of buffers."""

import collections
import math
import weakref

import numpy as np
from jaxtyping import UInt8


class BufferPool:
    """Arrays of one shape, whose memory is used again once nobody holds it.

    The system clears fresh memory page by page when it is first written to, which
    costs an image as much as its mask and its boxes, on a virtual machine far more.
    """

    def __init__(self, *shape: int):
        """Takes the shape of all arrays; threads may share this object."""
        self._shape = shape
        self._free: collections.deque[bytearray] = collections.deque()

    def __reduce__(self):
        return BufferPool, self._shape

    def take(self) -> UInt8[np.ndarray, "..."]:
        """An array of any content; it and its views may be kept for ever."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = bytearray(math.prod(self._shape))
        # Every view of `array` holds it: numpy looks through arrays for the owner of
        # their memory, but a bytearray is none.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(self._shape)
