"""Which camera took an image, by its file name."""

import collections
import os
import re
from collections.abc import Sequence

from absl import logging

from personmae_jax.errors import ConfigError

# alice_cam2.jpg; and as Market-1501 has it, 0002_c1s1_000451_03.jpg, or c3_0001.jpg.
_WORD = re.compile(r"(?:^|[_-])cam(?:era)?[_-]?(\d{1,9})(?!\d)", re.IGNORECASE)
_LETTER = re.compile(r"(?:^|_)c_?(\d{1,9})(?!\d)", re.IGNORECASE)
_FIRST = re.compile(r"(\d{1,9})_")
_MOST = 64  # cameras that saw one person; MSMT17 has 15 in all


def cameras_of(paths: Sequence[str], where: str) -> list[int] | None:
    """Returns the camera of every image; None where no name tells one.

    That is the number of `_camNUMBER` or `_cNUMBER`, else, if no name has such, the
    one before the first underscore, which may count frames or people instead.

    Raises:
      ConfigError: Some names tell a camera and others do not, or it is none.
    """
    names = [os.path.basename(path) for path in paths]
    marked = [_WORD.search(name) or _LETTER.search(name) for name in names]
    found = marked if any(marked) else [_FIRST.match(name) for name in names]
    if not any(found):
        return None
    cameras = [int(match[1]) for match in found if match]
    if len(cameras) < len(names):
        wrong = names[found.index(None)]
        raise ConfigError(
            f"{where}: {len(names) - len(cameras)} of {len(names)} names tell no "
            f"camera, e.g. {wrong.encode('utf-8', 'replace').decode()}; name all "
            "images ..._cCAMERA..., e.g. 000001_c2.jpg, or none"
        )
    _refuse_others(
        [os.path.dirname(path) for path in paths], cameras, not any(marked), where
    )
    return cameras


def _refuse_others(
    people: list[str], cameras: list[int], is_first: bool, where: str
) -> None:
    """Raises ConfigError if the numbers count frames or people, as far as is seen."""
    pairs = {*zip(people, cameras, strict=True)}
    most = max(collections.Counter(people).values())
    seen_by = max(collections.Counter(person for person, _ in pairs).values())
    reason = None
    if seen_by > _MOST or (is_first and len(pairs) == len(people) and most > 2):
        reason = "differs in all or very many images of a person"
    elif is_first and 1 < len(pairs) == len({*people}) == len({*cameras}) and most > 1:
        reason = "is the same in all images of a person and another for each person"
    if reason:
        place = "before the first _" if is_first else "behind the c or cam"
        raise ConfigError(
            f"{where}: the number {place} of a name {reason}, so it is no camera; name "
            "them ..._cCAMERA..., e.g. 000001_c2.jpg, or without a number there if no "
            "camera is known"
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
