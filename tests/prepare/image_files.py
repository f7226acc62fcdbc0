"""Small images of every kind, and archives of them, for the tests of preparation."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import simplejpeg
from PIL import Image


def jpeg(seed: int, height: int = 24, width: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels)


def encode(pixels, kind: str, mode: str | None = None, **options) -> bytes:
    image, out = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(out, kind, **options)
    return out.getvalue()


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (24, 16, 3), np.uint8)
    return encode(pixels, kind, mode, **options)


def names(count: int) -> list[str]:
    """In LUPerson's form, in the order of bytes."""
    return [f"{n % 3:02}_{n % 5:02}_{n % 7:04}_{n:08}" for n in range(count)]


def members(count: int) -> dict[str, bytes]:
    found = {f"{name}.jpg": jpeg(n) for n, name in enumerate(names(count))}
    return dict(sorted(found.items()))


def write_folder(root, content: dict[str, bytes]):
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path, content: dict[str, bytes], method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def write_tar(path, content: dict[str, bytes], is_compressed=False):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = out.getvalue()
    path.write_bytes(gzip.compress(data, 1) if is_compressed else data)
    return path


def write_lmdb(path, content: dict[str, bytes], keys=None):
    import lmdb

    with lmdb.open(str(path), map_size=1 << 28) as database:
        with database.begin(write=True) as transaction:
            for name, data in content.items():
                transaction.put(name.encode(), data)
    if keys is not None:
        (path / "keys.pkl").write_bytes(pickle.dumps(keys))
    return path
