"""A tensor in a file, read when it is used."""

import dataclasses
from collections.abc import Callable

import ml_dtypes  # noqa: F401  # makes "bfloat16" a name that numpy knows
import numpy as np
from jaxtyping import Float32

from personmae_jax.errors import first_line

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, which is read when `array` is called."""

    shape: tuple[int, ...]  # as the file says; nothing of that size is allocated yet
    dtype: str  # its name, as numpy's or as the file has it
    read: Callable[[], np.ndarray]  # returns what `array` converts

    def array(self) -> Float32[np.ndarray, "..."]:
        """Returns a contiguous float32 copy with its own memory.

        Raises:
          ValueError: It is not of a float type, is not a plain tensor, claims more
            elements than are stored, or holds NaN or infinity.
        """
        if self.dtype not in _FLOATS:
            raise ValueError(f"of type {self.dtype}; it must be one of {_FLOATS}")
        try:
            values = self.read()
            with np.errstate(over="ignore"):  # of float64: found below
                array = np.array(values, np.float32, order="C")
        except ValueError:
            raise
        except Exception as e:  # torch and safetensors raise whatever they meet
            raise ValueError(f"unreadable ({first_line(e)})") from e
        if not np.isfinite(array).all():
            count = array.size - np.isfinite(array).sum()
            raise ValueError(f"not finite in {count} of {array.size} places")
        return array
