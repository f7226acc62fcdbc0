"""What is noted of each finished shard: for the summary, for copies, for --check."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from personmae_jax import foreign_files
from personmae_jax.engine.storage import appearing_whole
from personmae_jax.errors import RunError

_CHECKS = "checks"

# What became of a member.
STORED, CONVERTED, REJECTED, DUPLICATE = range(4)
ROW = np.dtype(
    [
        ("state", "u1"),
        ("outcome", "u1"),  # images.Outcome
        ("height", "u4"),  # pixels, upright
        ("width", "u4"),
        ("checksum", "u4"),  # CRC-32 of the stored record
        ("digest", "V16"),  # BLAKE2b of the source's bytes
    ]
)
NO_DIGEST = bytes(16)


@dataclasses.dataclass(frozen=True, eq=False)
class Checks:
    """What is known of a finished shard."""

    rows: np.ndarray  # one `ROW` a member
    rejected: list[tuple[str, str]]  # (name, reason) of what was not stored, in order
    sums: np.ndarray  # of the stored pixels, (value, square) by RGB, exact
    num_bytes: int  # of the stored records
    file_digest: str  # BLAKE2b


def digest(data: bytes) -> bytes:
    """16 bytes that no two different files share."""
    return hashlib.blake2b(data, digest_size=16).digest()


def digest_file(file: Any) -> str:
    """The digest of an open file's whole content, as text."""
    blake2b = functools.partial(hashlib.blake2b, digest_size=16)
    return hashlib.file_digest(file, blake2b).hexdigest()


def find_copies(digests: np.ndarray) -> np.ndarray:
    """Whether an earlier member has the same digest; `NO_DIGEST` is nobody's."""
    _, first = np.unique(digests, return_index=True)
    is_copy = digests != np.void(NO_DIGEST)
    is_copy[first] = False
    return is_copy


def _checks_file(folder: epath.Path, shard: int) -> epath.Path:
    return folder / _CHECKS / f"{shard:05}.npz"


def write_checks(folder: epath.Path, shard: int, checks: Checks) -> None:
    about = {
        "rejected": checks.rejected,
        "num_bytes": checks.num_bytes,
        "file_digest": checks.file_digest,
    }
    write_arrays(
        _checks_file(folder, shard),
        rows=checks.rows,
        sums=checks.sums,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )


def read_checks(folder: epath.Path, shard: int, num_rows: int) -> Checks:
    """What `shard.write_shard` noted of shard number `shard`, of `num_rows` members.

    Raises:
      RunError: The notes are missing or damaged.
    """
    file = _checks_file(folder, shard)
    with open_arrays(file, "preparing again writes it anew") as arrays:
        about = json.loads(arrays["about"].tobytes())
        rejected = [(name, reason) for name, reason in about.pop("rejected")]
        checks = Checks(arrays["rows"], rejected, arrays["sums"], **about)
        if (checks.rows.dtype, checks.rows.shape) != (ROW, (num_rows,)):
            raise ValueError("rows of another shard or version")
    return checks


def write_arrays(file: epath.Path, **arrays: Any) -> None:
    """Writes an .npz file of ours.

    A killed process must not leave a part that the next start takes for the whole.
    """
    file.parent.mkdir(exist_ok=True)
    with appearing_whole(file, is_shared=True) as part, open(part, "wb") as opened:
        np.savez(opened, **arrays)


@contextlib.contextmanager
def open_arrays(file: epath.Path, way_out: str) -> Iterator[Any]:
    """The arrays of an .npz file of ours, by name.

    Raises:
      RunError: It is missing or damaged, or what is done with it fails.
    """
    try:
        with foreign_files.open_file(file) as opened, np.load(opened) as arrays:
            if sum(x.file_size for x in arrays.zip.infolist()) > foreign_files.MAX_TEXT:
                raise ValueError("members of absurd size")
            yield arrays
    except Exception as error:  # zip, zlib and numpy have no common one
        # Theirs are not quoted: numpy advises to allow pickles.
        raise RunError(f"{file} is missing or damaged; {way_out}") from error
