"""What a source of images holds: packed names, and where each member's bytes lie."""

import dataclasses

import numpy as np
from jaxtyping import Int64

from personmae_jax.data.names import Names

Place = Int64[np.ndarray, " columns"]  # where a member lies, as its reader knows it


class MemberError(Exception):
    """One member that cannot be read, while its neighbours may; says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The members of one source, in its order."""

    kind: str  # "folder", "zip", "tar" or "lmdb"
    paths: tuple[str, ...]  # the folder, or the archive's file or files
    names: Names  # as they are there; never used as a path but in a folder
    places: Int64[np.ndarray, "n columns"]  # the columns are the reader's, maybe none
    identities: Names | None = None  # as text, if the source keeps such a list
    videos: Names | None = None  # the same


def no_places(num_members: int) -> Int64[np.ndarray, "n 0"]:
    """The places of a source whose members are found by their names."""
    return np.zeros((num_members, 0), np.int64)
