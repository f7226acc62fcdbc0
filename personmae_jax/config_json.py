"""Config <-> JSON, both ways, and the differences between two of them."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from personmae_jax.config import Config
from personmae_jax.errors import ConfigError


def config_to_json(cfg: Config) -> str:
    """Text of `config.json`: sorted keys, two spaces, one newline at the end."""
    text = json.dumps(
        dataclasses.asdict(cfg), indent=2, sort_keys=True, allow_nan=False
    )
    return text + "\n"


def config_from_json(text: str) -> Config:
    """The `Config` that `config_to_json` wrote, tuples and numbers restored.

    Raises:
      ConfigError: No JSON object, or a field is unknown, missing or of a wrong type.
    """
    return _restore(Config, parse_object(text), "config")


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`; raises ConfigError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"this is no JSON: {e}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"this is no JSON object but {_shorten(value)}")
    return value


def differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """Field name -> "768 there, 384 here" for every field that is not equal.

    Args:
      there: A parsed `config.json`.
      here: Another one.
    """
    old, new = dict(_leaves(there, "config")), dict(_leaves(here, "config"))
    result = {}
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            result[name] = f"absent there, {_shorten(new[name])} here"
        elif name not in new:
            result[name] = f"{_shorten(old[name])} there, absent here"
        elif old[name] != new[name]:
            result[name] = f"{_shorten(old[name])} there, {_shorten(new[name])} here"
    return result


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, child in value.items():
        yield from _leaves(child, f"{name}.{key}")


def _restore(kind: Any, value: Any, name: str) -> Any:
    """`value`, as JSON has it, in the type `kind` of the field `name`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _restore_fields(kind, value, name)
    if origin is tuple and isinstance(value, list):
        is_open = arguments[-1] is Ellipsis
        kinds = arguments[:1] * len(value) if is_open else arguments
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(
                _restore(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(pairs)
            )
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (k for k in arguments if k is not type(None))
        return _restore(kind, value, name)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    wanted = kind.__name__ if isinstance(kind, type) else str(kind)
    raise ConfigError(f"{name} is {_shorten(value)}, but this code wants {wanted}")


def _restore_fields(kind: Any, value: dict[str, Any], name: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(value.keys() - set(known))
    missing = sorted(set(known) - value.keys())
    if unknown or missing:
        wrong = [f"{name}.{f} is unknown to this code" for f in unknown]
        wrong += [f"{name}.{f} is missing" for f in missing]
        raise ConfigError("; ".join(wrong) + "; use the version that wrote it")
    return kind(**{f: _restore(hints[f], value[f], f"{name}.{f}") for f in known})


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
