"""What a source of images holds: packed names, and where each member's bytes lie."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int64, UInt8


class MemberError(Exception):
    """One member that cannot be read, while its neighbours may; says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
    """Byte strings end to end: 4 million names take 0.1 GB, as objects 0.4."""

    text: UInt8[np.ndarray, " bytes"]
    ends: Int64[np.ndarray, " n"]

    @classmethod
    def pack(cls, names: Iterable[bytes]) -> "Names":
        lengths: list[int] = []
        text = bytearray()
        for name in names:
            text += name
            lengths.append(len(name))
        return cls(np.frombuffer(text, np.uint8), np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end]
            start = end


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The members of one source, in its order.

    Attributes:
      kind: "folder", "zip", "tar" or "lmdb".
      paths: The folder, or the archive's file or files.
      names: What each member is called; bytes as they are there, never used as a
        path unless the source is a folder.
      places: Where each member lies; the columns are the reader's own, maybe none.
      identities: Text of each member's identity, if the source keeps such a list.
      videos: The same of the video.
    """

    kind: str
    paths: tuple[str, ...]
    names: Names
    places: Int64[np.ndarray, "n columns"]
    identities: Names | None = None
    videos: Names | None = None


def no_places(num_members: int) -> Int64[np.ndarray, "n 0"]:
    """The places of a source whose members are found by their names."""
    return np.zeros((num_members, 0), np.int64)


def printable(name: bytes) -> str:
    """The name as text, whatever its bytes."""
    return name.decode("utf-8", "backslashreplace")
