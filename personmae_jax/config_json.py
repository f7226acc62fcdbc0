"""Settings <-> JSON, both ways, and the differences between two of them."""

import dataclasses
import json
import types
import typing
from typing import Any

from absl import logging

from personmae_jax.config import Config
from personmae_jax.config_check import CHOICES, RANGES, encoder_problems
from personmae_jax.config_finetune import FinetuneConfig
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.config_values import field_paths, range_problems
from personmae_jax.errors import ConfigError

Settings = Config | FinetuneConfig | UnsupervisedConfig

# Names that earlier versions wrote, and today's.
_RENAMED = {"code_grid": "pos_embed_grid"}

# Settings that earlier versions wrote, and the values that mean what is done today.
# The two decays meant something beside schedule="absolute" alone.
_DROPPED = {
    "config.regions.min_overlap": (0.0,),
    "config.loss.feature_loss": ("mse",),
    "config.loss.centre_momentum": (None,),
    "config.teacher.schedule": ("fraction",),
    "config.teacher.start_decay": None,
    "config.teacher.end_decay": None,
}

# What was done before there was a setting whose default is another.
_BEFORE = {
    "regions": {"nested": 0.0},
    "loss": {"feature_blocks": 1, "feature_instance_norm": False, "cls_weight": 0.0},
}


def neck_feature(cfg: Settings) -> str:
    """Whether a run is scored by features "before" or "after" its batch norm."""
    if isinstance(cfg, FinetuneConfig):
        return cfg.head.feature
    return "after" if isinstance(cfg, UnsupervisedConfig) else "before"


def config_to_json(cfg: Settings) -> str:
    """Text of `config.json`: sorted keys, two spaces, one newline at the end."""
    text = json.dumps(
        dataclasses.asdict(cfg), indent=2, sort_keys=True, allow_nan=False
    )
    return text + "\n"


def config_from_json(text: str) -> Settings:
    """The settings that `config_to_json` wrote, tuples and numbers restored.

    A missing field was not there yet when `text` was written, and takes what `_BEFORE`
    has for it, else its default, which must then mean what was done before there was
    one. A field that is gone is ignored, with a warning if it made a difference.

    Raises:
      ConfigError: No JSON object, a field is unknown, of a wrong type or range, or no
        encoder can be built so.
    """
    value = parse_object(text)
    for setting in dropped_settings(text):
        logging.warning("%s is no longer supported and is ignored.", setting)
    default = Config()
    if "cluster" in value:  # only training without labels clusters
        default = UnsupervisedConfig()
    elif "sampling" in value:  # of the others, only fine-tuning has batches of P x K
        default = FinetuneConfig()
    else:
        for section, fields in _BEFORE.items():
            if isinstance(value.get(section), dict):
                value[section] = fields | value[section]
    cfg = _restore_fields(default, value, "config")
    if problems := [*range_problems(cfg, CHOICES, RANGES)] or [*encoder_problems(cfg)]:
        raise ConfigError("; ".join(problems))
    return cfg


def dropped_settings(text: str) -> list[str]:
    """What `text` asks for and this code dropped, as "config.section.field=value"."""
    found, tree = [], parse_object(text)
    for path, harmless in _DROPPED.items():
        _, section, name = path.split(".")
        fields: Any = tree.get(section)
        is_there = isinstance(fields, dict) and name in fields
        if is_there and harmless is not None and fields[name] not in harmless:
            found.append(f"{path}={fields[name]!r}")
    return found


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`; raises ConfigError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"this is no JSON: {e}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"this is no JSON object but {_shorten(value)}")
    return value


def differences(there: Settings, here: Settings) -> dict[str, str]:
    """Field name -> "768 there, 384 here" for every field that is not equal.

    Both are of one kind.
    """
    old = dict(field_paths(there, "config."))
    return {
        name: f"{_shorten(old[name])} there, {_shorten(value)} here"
        for name, value in field_paths(here, "config.")
        if value != old[name]
    }


def _restore(kind: Any, value: Any, name: str) -> Any:
    """`value`, as JSON has it, in the type `kind` of the field `name`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
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


def _restore_fields(default: Any, value: dict[str, Any], name: str) -> Any:
    """The dataclass `default` with the fields that `value` has."""
    hints = typing.get_type_hints(type(default))
    value = {_RENAMED.get(field, field): child for field, child in value.items()}
    value = {f: x for f, x in value.items() if f"{name}.{f}" not in _DROPPED}
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        wrong = "; ".join(
            f"{name}.{field} is unknown to this code" for field in unknown
        )
        raise ConfigError(f"{wrong}; use the version that wrote it")
    fields = {}
    for field, child in value.items():
        old, path = getattr(default, field), f"{name}.{field}"
        if dataclasses.is_dataclass(old) and isinstance(child, dict):
            fields[field] = _restore_fields(old, child, path)
        else:
            fields[field] = _restore(hints[field], child, path)
    return dataclasses.replace(default, **fields)


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
