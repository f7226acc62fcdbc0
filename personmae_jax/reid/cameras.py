"""Which camera took an image, by its file name."""

import collections
import os
import re
from collections.abc import Sequence

from absl import logging

from personmae_jax.errors import ConfigError

# As Market-1501 has it, 0002_c1s1_000451_03.jpg, and alice_cam2.jpg; c3_0001.jpg.
_MARKED = re.compile(r"(?:^|_)c(?:am(?:era)?)?_?(\d{1,9})(?!\d)", re.IGNORECASE)
_FIRST = re.compile(r"(\d{1,9})_")


def cameras_of(paths: Sequence[str], where: str) -> list[int] | None:
    """Returns the camera of every image; None where no name tells one.

    That is the number of `_cNUMBER`, else the one before the first underscore, which
    may count frames instead: then it differs in all images of a person.

    Raises:
      ConfigError: Some names tell a camera and others do not, or it is none.
    """
    names = [os.path.basename(path) for path in paths]
    marked = [_MARKED.search(name) for name in names]
    first = [_FIRST.match(name) for name in names]
    found = marked if all(marked) else first
    if not any(marked) and not any(first):
        return None
    cameras = [int(match[1]) for match in found if match]
    if len(cameras) < len(names):
        wrong = names[found.index(None)]
        raise ConfigError(
            f"{where}: {len(names) - len(cameras)} of {len(names)} names tell no "
            f"camera, e.g. {wrong.encode('utf-8', 'replace').decode()}; name all "
            "images ..._cCAMERA..., e.g. 000001_c2.jpg, or none"
        )
    if found is first:
        _refuse_frames([os.path.dirname(path) for path in paths], cameras, where)
    return cameras


def _refuse_frames(people: list[str], cameras: list[int], where: str) -> None:
    pairs = [*zip(people, cameras, strict=True)]
    most = max(collections.Counter(people).values())
    if len({*pairs}) == len(pairs) and most > 2:
        raise ConfigError(
            f"{where}: the number before the first _ of a name differs in all images "
            "of a person, so it is no camera; name them ..._cCAMERA..., e.g. "
            "000001_c2.jpg, or without a number there if no camera is known"
        )


def first_against_others(
    places: Sequence[tuple[str, int, int]], where: str
) -> list[tuple[str, int, int]]:
    """(path, identity, camera) with camera 0 for each identity's first image, else 1.

    As it is usual where no camera is known; a warning says so.
    """
    logging.warning(
        "%s: its images to test on are of one camera or of none that is told; the "
        "first image of each identity is queried among the others, which is easier "
        "than across cameras: compare no published scores",
        where,
    )
    first = {identity: path for path, identity, _ in reversed(places)}
    return [(path, who, int(path != first[who])) for path, who, _ in places]
