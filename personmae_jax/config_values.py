"""Names, types and ranges of settings, whatever is trained with them."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from personmae_jax.errors import ConfigError, quoted

_NO_PATH = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")
_LARGEST = 2**31 - 1  # what jax's int32 holds


def range_problems(
    cfg: object, choices: Mapping[str, Any], ranges: Mapping[str, Any]
) -> Iterator[str]:
    """Yields a line for every setting that the table of its path does not admit.

    Raises:
      ConfigError: As of `check_types`; nothing can be compared.
    """
    check_types(cfg)
    value: Any
    for path, value in field_paths(cfg):
        if path in choices and value not in choices[path]:
            close = difflib.get_close_matches(str(value), choices[path], 1, 0.0)[0]
            yield (
                f"config.{path}={value!r} is not one of {', '.join(choices[path])}; "
                f"did you mean --config.{path}={close}?"
            )
        if path in ranges and value is not None:
            low, high = ranges[path]
            high = _LARGEST if high is None else high
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(low <= x <= high for x in numbers):  # also catches nan
                rule = f"it must be in {low} .. {high}"
                yield f"config.{path}={quoted(value)} is out of range: {rule}"


def check_types(cfg: object) -> None:
    """Raises ConfigError, a line for every value of another type than its field."""
    if wrong := [*_type_problems(cfg)]:
        raise ConfigError("\n".join(wrong))


def _type_problems(cfg: object, prefix: str = "config.") -> Iterator[str]:
    """Yields a line for every value that is not of its field's type."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        value, path = getattr(cfg, name, ...), prefix + name
        is_section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        if is_section and isinstance(value, kind):
            yield from _type_problems(value, path + ".")
        elif not _is_of(kind, value):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            shown = f"{type(value).__name__} {quoted(value)}"
            yield f"{path} must be of type {wanted}, but is {shown}"
        elif isinstance(value, str) and _NO_PATH.search(value):
            yield f"{path}={value[:100]!r} holds what no name of a file can hold"


def _is_of(kind: Any, value: object) -> bool:
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is_of(one, value) for one in arguments)
    if typing.get_origin(kind) is tuple and type(value) is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        pairs = zip(kinds, value, strict=False)
        return len(kinds) == len(value) and all(_is_of(*pair) for pair in pairs)
    # JSON knows numpy's float64; what else inherits from float may do anything.
    return type(value) in ((int, float, np.float64) if kind is float else (kind,))


def field_paths(cfg: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted path, value) of every leaf setting, e.g. ("optim.beta1", 0.9)."""
    for field in dataclasses.fields(cfg):  # type: ignore[arg-type]
        value, path = getattr(cfg, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from field_paths(value, path + ".")
        else:
            yield path, value


def nearest_field(paths: Iterable[str], path: str) -> str:
    """Returns that of the dotted paths of settings which looks most like `path`."""
    paths = [*paths]
    same_leaf = [p for p in paths if p.rpartition(".")[2] == path.rpartition(".")[2]]
    return (same_leaf or difflib.get_close_matches(path, paths, 1, 0.0))[0]
