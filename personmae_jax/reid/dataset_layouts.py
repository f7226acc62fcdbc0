"""Which files a re-identification data set keeps where: paths, identities, cameras.

What is laid out otherwise is a ConfigError that says how.
"""

import os
import re
from collections.abc import Sequence

from personmae_jax import foreign_files
from personmae_jax.data import names
from personmae_jax.data.records import IMAGE_SUFFIXES
from personmae_jax.errors import ConfigError
from personmae_jax.reid.cameras import cameras_of, first_against_others

JUNK = -1  # identity of what the detector should not have cut out; Market-1501

LAYOUTS = {
    "market1501": "query/, bounding_box_test/ and, to train, bounding_box_train/, "
    "each with images named IDENTITY_cCAMERA..., e.g. 0002_c1s1_000451_03.jpg",
    "msmt17": "list_query.txt, list_gallery.txt and, to train, list_train.txt and "
    "list_val.txt (both are trained on), which are part of the release, with lines "
    "`0000/0000_000_01_0303morning_0008_0.jpg 0`, beside test/ and train/ (or "
    "mask_test_v2/ and mask_train_v2/)",
    "id_folders": "a folder for each identity with images named CAMERA_... or "
    "..._cCAMERA..., e.g. 004/01_3.jpg; or val/ and train/, each of that kind",
    "occluded_whole": "occluded_body_images/ (or partial_body_images/), the queries, "
    "and whole_body_images/, the gallery, each with a folder for each identity or "
    "with images named IDENTITY_..., e.g. 001/001_01.tif; or test/ and train/, each "
    "of that kind",
}

# No more digits than an int64 holds.
_MARKET1501_NAME = re.compile(r"(-1|\d{1,18})_c(\d{1,18})(?!\d)")
_MSMT17_NAME = re.compile(r"\d+_\d+_(\d{1,18})_")
_OCCLUDED_WHOLE_NAME = re.compile(r"(\d+)")
# Partial-REID has the first two; its queries are the first.
_OCCLUDED = ("partial_body_images", "occluded_body_images")
_WHOLE = "whole_body_images"

# Of which names a folder in a layout has all of one row.
_MARKS = {
    "market1501": (("query", "bounding_box_test"), ("bounding_box_train",)),
    "msmt17": (("list_query.txt", "list_gallery.txt"), ("list_train.txt",)),
    "occluded_whole": tuple((folder, _WHOLE) for folder in _OCCLUDED),
}

Place = tuple[str, int, int]  # path under the root, identity, camera
Parts = tuple[list[Place], list[Place], list[Place]]  # query, gallery, train


def read_market1501(root: str) -> Parts:
    """Lists a folder in the layout of Market-1501; training junk is left out.

    Without query and gallery there are images to train on alone.
    """
    folders = ("query", "bounding_box_test", "bounding_box_train")
    if not _is_laid_out("market1501", root):
        raise _unexpected("market1501", root)

    def read(folder: str) -> list[Place]:
        if not os.path.isdir(os.path.join(root, folder)):
            return []
        names = [f"{folder}/{n}" for n in _images(os.path.join(root, folder))]
        found = _match("market1501", root, _MARKET1501_NAME, names)
        return [(n, int(m[1]), int(m[2])) for n, m in zip(names, found, strict=True)]

    query, gallery, train = map(read, folders)
    return query, gallery, [place for place in train if place[1] != JUNK]


def read_msmt17(root: str) -> Parts:
    """Reads the lists of MSMT17, either version; val is trained on, as is usual.

    Without query and gallery there are images to train on alone.
    """
    if not _is_laid_out("msmt17", root):
        raise _unexpected("msmt17", root)
    present = _listed(root)

    def read(list_file: str, *folders: str) -> list[Place]:
        if list_file not in present:
            return []
        folder = next((f for f in folders if f in present), folders[0])
        where = os.path.join(root, list_file)
        lines = [_parse(line, where) for line in _lines(where)]
        names = [f"{folder}/{name}" for name, _ in lines]
        missing = [n for n in names if not os.path.isfile(os.path.join(root, n))]
        if missing:
            raise ConfigError(
                f"{printable(where)!r} lists {len(missing)} images that are not there, "
                f"e.g. {printable(missing[0])}; unpack the whole data set"
            )
        found = _match("msmt17", root, _MSMT17_NAME, names)
        return [
            (name, identity, int(m[1]))
            for name, (_, identity), m in zip(names, lines, found, strict=True)
        ]

    query = read("list_query.txt", "test", "mask_test_v2")
    gallery = read("list_gallery.txt", "test", "mask_test_v2")
    train = read("list_train.txt", "train", "mask_train_v2")
    return query, gallery, train + read("list_val.txt", "train", "mask_train_v2")


def read_id_folders(root: str, query_camera: int | None) -> Parts:
    """Lists a folder for each identity; identities are numbered in sorted order.

    Where no name tells a camera, or all images to test on are of one, the first image
    of each identity is queried among its others and everybody else's.
    """
    for other in _MARKS:
        if _is_laid_out(other, root):
            raise ConfigError(f"{root!r} is {other}: its folders are no identities")
    has_parts = all(os.path.isdir(os.path.join(root, p)) for p in ("val", "train"))
    where = f"id_folders in {root!r}"
    test = _people_of(root, "val" if has_parts else "")
    train = _people_of(root, "train") if has_parts else []
    cameras = cameras_of([path for path, _ in test + train], where) or [0]
    if len(cameras) == 1:
        cameras *= len(test + train)
    pairs = zip(test + train, cameras, strict=True)
    places = [(path, identity, camera) for (path, identity), camera in pairs]
    test, train = places[: len(test)], places[len(test) :]
    cameras = sorted({*cameras[: len(test)]})
    if len(cameras) == 1 and query_camera is None:
        test = first_against_others(test, where)
        cameras = [0]
    chosen = cameras[0] if query_camera is None else query_camera
    if chosen not in cameras:
        raise ConfigError(
            f"{where}: no image is of the query camera {chosen}; its cameras are "
            f"{', '.join(map(str, cameras))}"
        )
    query = [place for place in test if place[2] == chosen]
    return query, [place for place in test if place[2] != chosen], train


def _people_of(root: str, part: str) -> list[tuple[str, int]]:
    """(path, number of the identity) of all images in folders of identities."""
    found = []
    for number, identity in enumerate(_listed(os.path.join(root, part))):
        folder = os.path.join(part, identity)
        if os.path.isdir(os.path.join(root, folder)):
            images = _images(os.path.join(root, folder))
            found += [(os.path.join(folder, image), number) for image in images]
    if not found:
        raise _unexpected("id_folders", os.path.join(root, part))
    return found


def read_occluded_whole(root: str) -> Parts:
    """Lists people of whom a part is seen, and the same people as a whole.

    Occluded-REID, P-DukeMTMC-reID (which has images to train on) and Partial-REID. Both
    kinds are trained on; the partly seen count as camera 0, the whole as camera 1.
    """
    has_parts = all(os.path.isdir(os.path.join(root, p)) for p in ("test", "train"))

    def read(part: str) -> tuple[list[Place], list[Place]]:
        where = os.path.join(root, part)
        if not _is_laid_out("occluded_whole", where):
            raise _unexpected("occluded_whole", where)
        occluded = next(f for f in _OCCLUDED if f in _listed(where))
        found = [_people_below(root, os.path.join(part, occluded))]
        found.append(_people_below(root, os.path.join(part, _WHOLE)))
        # One person has one name in both folders; numbers are those of sorted names.
        people = {identity for names in found for _, identity in names}
        people = sorted(people, key=lambda name: (len(name), name))
        number = {identity: i for i, identity in enumerate(people)}
        query, gallery = (
            [(name, number[identity], camera) for name, identity in names]
            for camera, names in enumerate(found)
        )
        return query, gallery

    query, gallery = read("test" if has_parts else "")
    return query, gallery, sum(read("train"), []) if has_parts else []


def _people_below(root: str, folder: str) -> list[tuple[str, str]]:
    """(path, name of the identity): the folder's that an image is in, or its own."""
    found = []
    for name in _listed(os.path.join(root, folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(os.path.join(root, path)):
            images = _images(os.path.join(root, path))
            found += [(os.path.join(path, image), name.lstrip("0")) for image in images]
    alone = [os.path.join(folder, name) for name in _images(os.path.join(root, folder))]
    matches = _match("occluded_whole", root, _OCCLUDED_WHOLE_NAME, alone)
    named = [m[1].lstrip("0") for m in matches]
    return found + list(zip(alone, named, strict=True))


def printable(name: str) -> str:
    """The name as text, whatever its bytes."""
    return names.printable(os.fsencode(name))


def _lines(path: str) -> list[str]:
    try:
        return [os.fsdecode(line) for line in foreign_files.read_lines(path)]
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be read ({error.strerror})") from error


def _parse(line: str, where: str) -> tuple[str, int]:
    """Splits `PATH IDENTITY`; the path stays inside the data set."""
    path, _, identity = line.rpartition(" ")
    is_outside = os.path.isabs(path) or ".." in path.split("/")
    if not path or is_outside or not re.fullmatch(r"\d{1,18}", identity):
        raise ConfigError(
            f"{printable(where)!r} has the line {printable(line)!r}; "
            f"msmt17 is {LAYOUTS['msmt17']}"
        )
    return path.strip(), int(identity)


def _match(
    layout: str, root: str, pattern: re.Pattern[str], names: Sequence[str]
) -> list[re.Match[str]]:
    """Reads the file name of every path, or says which cannot be read."""
    found = [pattern.match(os.path.basename(name)) for name in names]
    wrong = [name for name, match in zip(names, found, strict=True) if not match]
    if wrong:
        raise ConfigError(
            f"{layout} in {root!r}: {len(wrong)} of {len(names)} names beside one "
            f"another tell no identity and camera, e.g. {printable(wrong[0])}; "
            f"{layout} is {LAYOUTS[layout]}"
        )
    return [match for match in found if match]


def _unexpected(layout: str, folder: str) -> ConfigError:
    names = _listed(folder)
    shown = ", ".join(map(printable, names[:5])) or "nothing"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ConfigError(
        f"{folder!r} is not {layout}, which is {LAYOUTS[layout]}; it holds "
        f"{shown}{more}{_hint(layout, folder)}"
    )


def _hint(layout: str, folder: str) -> str:
    """What was meant instead: another layout, or a folder at most two levels below."""
    for other in _MARKS:
        if other != layout and _is_laid_out(other, folder):
            return f"; it looks like {other}"
    below = [""]
    for _ in range(2):
        below = [
            os.path.join(path, name)
            for path in below
            for name in _folders(os.path.join(folder, path))[:100]
        ]
        found = [p for p in below if _is_laid_out(layout, os.path.join(folder, p))]
        if found:
            return f"; take its subfolder {' or '.join(map(printable, found))}"
    return ""


def _is_laid_out(layout: str, folder: str) -> bool:
    return any(
        all(os.path.exists(os.path.join(folder, name)) for name in names)
        for names in _MARKS.get(layout, ())
    )


def _folders(folder: str) -> list[str]:
    """Names of the folders in one that can be listed; else none."""
    try:
        names = _listed(folder)
    except ConfigError:
        return []
    return [name for name in names if os.path.isdir(os.path.join(folder, name))]


def _images(folder: str) -> list[str]:
    """Names of the image files in one folder; Market-1501 has a Thumbs.db too."""
    names = _listed(folder)
    return [n for n in names if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES]


def _listed(folder: str) -> list[str]:
    """Names in one folder but the hidden ones, sorted as bytes on any machine."""
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"{folder!r} cannot be listed ({error.strerror})") from error
    return sorted(names, key=os.fsencode)
