"""What a tfds data set says of itself, checked before tfds believes it."""

import os
import re
from collections.abc import Sequence
from typing import Any

from personmae_jax import foreign_files

_FEATURE_CLASS = re.compile(  # of tfds itself; or a type of its JSON, e.g. "Tensor"
    r"tensorflow_datasets\.core\.features\.[\w.]+|\w+"
)
_MAX_SHARDS = 100_000


def check_files(path: str) -> None:
    """Raises an error where tfds would import what a stranger names, or hang."""
    features = [foreign_files.read_json(os.path.join(path, "features.json"))]
    while features:
        value = features.pop()
        if isinstance(value, list):
            features += value
        if isinstance(value, dict):
            features += value.values()
            for key, name in value.items():
                if not isinstance(name, str):
                    continue
                if _plain(key) == "json":  # a feature in older JSON, as a string
                    features.append(foreign_files.parse_json(name.encode()))
                is_class = _plain(key) in ("pythonclassname", "type")
                if is_class and not _FEATURE_CLASS.fullmatch(name):
                    raise ValueError(f"features.json names {name[:80]!r}")
    info = foreign_files.read_json(os.path.join(path, "dataset_info.json"))
    splits = info.get("splits") if isinstance(info, dict) else None
    if not isinstance(splits, list) or not all(isinstance(s, dict) for s in splits):
        raise ValueError("dataset_info.json lists no splits")
    fields = [(key, value) for split in splits for key, value in split.items()]
    num_shards = sum(len(v) for k, v in fields if _plain(k) == "shardlengths")
    if num_shards > _MAX_SHARDS:
        raise ValueError(f"dataset_info.json lists {num_shards} shards")


def _plain(key: str) -> str:
    """A field's name, which tfds reads as shardLengths and as shard_lengths."""
    return key.replace("_", "").lower()


def check_shards(instructions: Sequence[Any]) -> None:
    """Raises ValueError where a shard holds other than what dataset_info.json says."""
    from array_record.python import array_record_module  # type: ignore[attr-defined]

    for file, expected in {(i.filename, i.examples_in_shard) for i in instructions}:
        os.close(foreign_files.open_descriptor(file)[0])
        reader = array_record_module.ArrayRecordReader(file, "readahead_buffer_size:0")
        if (found := reader.num_records()) != expected:
            raise ValueError(
                f"{os.path.basename(file)} holds {found} records where "
                f"dataset_info.json says {expected}: one of them is damaged"
            )
        reader.close()
