"""An archive's file, or the parts that one was cut into, read as one; not unpacked."""

import io
import os

import numpy as np

from personmae_jax import foreign_files

DAMAGED = "download or copy it again"  # what helps


class JoinedFile(io.RawIOBase):
    """Several files end to end, as one that can be read and sought."""

    def __init__(self, paths: tuple[str, ...]):
        self._files: list[io.FileIO] = []  # `close` closes them if the next is missing
        for path in paths:
            self._files.append(foreign_files.open_file(path))
        sizes = [os.fstat(file.fileno()).st_size for file in self._files]
        self._starts = np.cumsum([0, *sizes]).tolist()
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._starts[-1])[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        part = int(np.searchsorted(self._starts, self._position, side="right")) - 1
        if part >= len(self._files):
            return 0
        self._files[part].seek(self._position - self._starts[part])
        count = self._files[part].readinto(buffer) or 0
        self._position += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def open_parts(paths: tuple[str, ...]) -> io.BufferedReader:
    """One file, or the parts of one that was split, open until nobody holds it."""
    return io.BufferedReader(JoinedFile(paths), 1 << 16)
