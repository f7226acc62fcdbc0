"""Reads a prepared data set back and compares it with the checksums noted of it."""

import zlib

from array_record.python import array_record_module  # type: ignore[attr-defined]
from etils import epath

from personmae_jax.errors import ConfigError, RunError, first_line
from personmae_jax.prepare.manifest import CONVERTED, digest_file, read_checks
from personmae_jax.prepare.plan import is_finished, read_plan
from personmae_jax.prepare.pool import run_shards
from personmae_jax.prepare.shard import plan_in, shard_file

_MAX_NAMED = 20  # records of one shard


def check(folder: str, num_processes: int | None = None) -> int:
    """Compares every shard; prints what is damaged.

    Returns:
      0: every byte is as it was written.

    Raises:
      ConfigError: It is no finished preparation.
      RunError: Something is damaged or missing.
    """
    path = epath.Path(folder).absolute()
    plan = read_plan(path)
    if plan is None or not is_finished(path):
        raise ConfigError(
            f"--check={folder} holds no finished preparation; name the --out of one"
        )
    shards = range(plan.num_shards)
    findings = run_shards(check_shard, str(path), plan, shards, num_processes)
    damaged = [finding for finding in findings if finding]
    for finding in damaged:
        print(finding)
    if damaged:
        raise RunError(
            f"{len(damaged)} of {plan.num_shards} shards are damaged; remove them and "
            f"{path}/dataset_info.json, and prepare again with the same command"
        )
    print(f"{path}: all {plan.num_shards} shards are as they were written")
    return 0


def check_shard(folder: str, shard: int) -> str:
    """What is wrong with one shard; nothing if every byte is as it was."""
    path = epath.Path(folder)
    plan = plan_in(folder)
    file = shard_file(path, shard, plan.num_shards)
    try:
        checks = read_checks(path, shard, plan.num_rows(shard))
        with open(file, "rb") as opened:
            if digest_file(opened) == checks.file_digest:
                return ""
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    except RunError as error:
        return str(error)
    expected = checks.rows[checks.rows["state"] <= CONVERTED]["checksum"].tolist()
    return f"{file.name}: {_damaged_records(file, expected)}"


def _damaged_records(file: epath.Path, expected: list[int]) -> str:
    try:
        reader = array_record_module.ArrayRecordReader(
            str(file), "readahead_buffer_size:0"
        )
        if reader.num_records() != len(expected):
            return f"{reader.num_records()} records instead of {len(expected)}"
    except Exception as error:  # array_record has no exception of its own
        return f"cannot be opened ({first_line(error)})"
    damaged = []
    for number, checksum in enumerate(expected):
        try:
            is_good = zlib.crc32(reader.read([number])[0]) == checksum
        except Exception:
            is_good = False
        if not is_good:
            damaged.append(str(number))
    if not damaged:
        return "its bytes differ, though every record is as it was"
    rest = f" and {len(damaged) - _MAX_NAMED} more" * (len(damaged) > _MAX_NAMED)
    return f"damaged records {', '.join(damaged[:_MAX_NAMED])}{rest}"
