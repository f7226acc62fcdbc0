"""What a preparation will do: which members go into which shard, settled before work.

A shard's bytes depend on its task and on the settings alone, so neither the number of
processes nor a restart shows in them. The tasks lie in `DIR/tasks`, so that a restart,
or a worker on another machine, does not list the sources again.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int64

from personmae_jax import foreign_files
from personmae_jax.data.names import Names
from personmae_jax.engine.storage import write_whole
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.prepare.keep_list import count_kept, read_keep_list, select
from personmae_jax.prepare.listing import Listing
from personmae_jax.prepare.sources import list_sources
from personmae_jax.prepare.task import Task, read_task, remove_tasks, write_task

VERSION = 1  # of the files in DIR; another one cannot be continued
_PLAN_FILE = "plan.json"
MARK = "dataset_info.json"  # written last: without it tfds opens nothing
_END = 1 << 16  # bytes of an archive that tell it from others
_MAX_SHARD = 8192  # images; 4.18 million make 511 shards of about 0.1 GB
_MIN_SHARD = 128
_MAX_MEMBERS = 2**31  # what a plan may count; 500 times LUPerson
_NUM_SHARDS = 64  # that smaller sets are cut into, for all cores to have work


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for; two that differ do not share a folder."""

    source: tuple[str, ...]
    keep_list: str | None = None
    keep_first: str | None = None
    min_side: int = 8  # pixels
    drop_duplicates: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request after its sources were listed."""

    # As JSON, with what else must not change: sizes of archives, the list.
    request: dict[str, Any]
    sources: list[tuple[str, tuple[str, ...]]]  # (kind, paths) of each
    num_listed: int  # members of all sources
    num_members: int  # those that are wanted
    num_shards: int  # their equal parts, but for the last
    names: str = ""  # SHA-256 of all that are listed; "": of an earlier version
    archives: str = ""  # the same of sizes and ends of all archives

    @property
    def shard_size(self) -> int:
        return _shard_size(self.num_members)

    def num_rows(self, shard: int) -> int:
        """Members of one shard, of which the last may have fewer."""
        return min(self.shard_size, self.num_members - shard * self.shard_size)


def describe(request: Request) -> dict[str, Any]:
    """The request as it is stored and compared.

    Raises:
      ConfigError: A source or the list is not there.
    """
    described = dataclasses.asdict(request)
    described["version"] = VERSION
    described["source"] = [os.path.abspath(path) for path in request.source]
    described["source_bytes"] = [  # of archives; folders, and what is gone, have none
        os.path.getsize(path) if os.path.isfile(path) else None
        for path in request.source
    ]
    if request.keep_list is not None:
        try:
            with foreign_files.open_file(request.keep_list) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ConfigError(
                f"--keep-list={request.keep_list}: {error.strerror}"
            ) from error
        described["keep_list"] = digest
    return described


def read_plan(folder: epath.Path) -> Plan | None:
    """The plan in the folder; None if there is none yet.

    Raises:
      ConfigError: It cannot be read.
    """
    try:
        content = foreign_files.read_json(folder / _PLAN_FILE)
        content["sources"] = [(kind, tuple(p)) for kind, p in content["sources"]]
        plan = Plan(**content)
        if not all(type(n) is int and 0 < n < _MAX_MEMBERS for n in _counts(plan)) or (
            plan.num_shards != -(-plan.num_members // plan.shard_size)
            or plan.num_members > plan.num_listed
            or not isinstance(plan.request, dict)
            or type(plan.request.get("min_side")) is not int
        ):
            raise ValueError("numbers that do not belong together")
        return plan
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(
            f"{folder / _PLAN_FILE} cannot be read ({error.strerror}); it may well be "
            "whole: fix the access to it and start again"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        way_out = f"move {folder} aside and start again"
        if is_finished(folder):
            way_out = (
                "the data set beside it is finished and can be trained on without; "
                "only --check and going on need it: for these name a new --out"
            )
        raise ConfigError(f"{folder / _PLAN_FILE} is damaged; {way_out}") from error


def is_finished(folder: epath.Path) -> bool:
    """Whether the folder holds a whole data set."""
    return (folder / MARK).exists()


def refuse_another(folder: epath.Path, plan: Plan, wanted: dict[str, Any]) -> None:
    """Compares what the folder was begun with, with what is asked for now.

    Raises:
      ConfigError: They differ; the message names the flags.
    """
    differences = [
        f"--{name.replace('_', '-')} was {plan.request.get(name)!r}, now {value!r}"
        for name, value in wanted.items()
        if plan.request.get(name) != value
    ]
    if differences:
        raise ConfigError(
            f"--out={folder} holds a preparation with other settings "
            f"({'; '.join(differences)}); give the same ones or another --out"
        )


def make_plan(
    folder: epath.Path, request: Request, earlier: Plan | None = None
) -> Plan:
    """Lists the sources and writes the tasks, then the plan, into the folder.

    `earlier` is that of shards that are there, whose tasks a finished preparation has
    removed: the sources must still be the same.

    Raises:
      ConfigError: There is nothing to prepare, or the list names nothing of it, or the
        sources are others than before.
    """
    described = describe(request)
    listings = list_sources(request.source)
    num_listed = sum(len(listing.names) for listing in listings)
    members = np.arange(num_listed)
    if request.keep_list is not None:
        wanted = read_keep_list(request.keep_list)
        members = select(listings, wanted, count_kept(request.keep_first, len(wanted)))
    size = _shard_size(len(members))
    plan = Plan(
        request=described,
        sources=[(listing.kind, listing.paths) for listing in listings],
        num_listed=num_listed,
        num_members=len(members),
        num_shards=-(-len(members) // size),
        names=_digest(listings),
        archives=_digest_archives([listing.paths for listing in listings]),
    )
    if earlier is not None and _counts(plan) != _counts(earlier):
        raise ConfigError(
            f"the sources hold {plan.num_listed:,} images, and {earlier.num_listed:,} "
            f"when {folder} was prepared; name a new folder with --out"
        )
    if earlier is not None and earlier.names not in ("", plan.names):
        raise ConfigError(
            f"the sources hold images of other names than when {folder} was prepared; "
            "name a new folder with --out"
        )
    remove_tasks(folder)
    for shard in range(plan.num_shards):
        part = members[shard * size : (shard + 1) * size]
        write_task(folder, shard, _make_task(listings, part))
    text = json.dumps(dataclasses.asdict(plan), indent=2)
    write_whole(folder / _PLAN_FILE, text + "\n")
    return plan


def has_tasks(folder: epath.Path, plan: Plan) -> bool:
    """Whether no shard's task is missing or damaged, as after one was finished."""
    try:
        counts = [len(read_task(folder, n).names) for n in range(plan.num_shards)]
    except RunError:
        return False
    return counts == [plan.num_rows(shard) for shard in range(plan.num_shards)]


def _counts(plan: Plan) -> tuple[int, int, int]:
    return plan.num_listed, plan.num_members, plan.num_shards


def _digest(listings: list[Listing]) -> str:
    """Of the names of all members in their order."""
    digest = hashlib.sha256()
    for listing in listings:
        listing.names.feed(digest)
    return digest.hexdigest()


def refuse_other_archives(folder: epath.Path, plan: Plan) -> None:
    """Refuses to go on by places in archives that have been replaced.

    Raises:
      ConfigError: They have been.
    """
    now = _digest_archives([paths for _, paths in plan.sources])
    if "" not in (plan.archives, now) and plan.archives != now:
        raise ConfigError(
            f"an archive of --source is another one than when {folder} was begun; "
            "bring the former back, or name a new folder with --out"
        )


def _digest_archives(sources: list[tuple[str, ...]]) -> str:
    """Of size, begin and end of every file; "" if one cannot be read.

    A file's place and age may differ between machines. A zip's end is its directory.
    """
    digest = hashlib.sha256()
    for path in itertools.chain.from_iterable(sources):
        if os.path.isdir(path):
            path = os.path.join(path, "data.mdb")
            if not os.path.exists(path):  # a folder of images
                continue
        try:
            with foreign_files.open_file(path) as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(str(size).encode())
                for start in (0, max(0, size - _END)):
                    file.seek(start)
                    digest.update(file.read(_END))
        except OSError:
            return ""
    return digest.hexdigest()


def _shard_size(num_members: int) -> int:
    return min(_MAX_SHARD, max(_MIN_SHARD, -(-num_members // _NUM_SHARDS)))


def _make_task(listings: list[Listing], members: Int64[np.ndarray, " n"]) -> Task:
    ends = np.cumsum([len(listing.names) for listing in listings])
    sources = np.searchsorted(ends, members, side="right")
    numbers = members - np.concatenate([[0], ends])[sources]
    width = max(listing.places.shape[1] for listing in listings)
    places = np.zeros((len(members), width), np.int64)
    for source in np.unique(sources):
        table = listings[source].places
        places[sources == source, : table.shape[1]] = table[numbers[sources == source]]
    pairs = [*zip(sources.tolist(), numbers.tolist(), strict=True)]

    def pack(column: str) -> Names:
        columns = [getattr(listing, column) for listing in listings]
        return Names.pack(columns[s][n] if columns[s] else b"" for s, n in pairs)

    return Task(pack("names"), sources, places, pack("identities"), pack("videos"))
