"""Flags and exit codes, the same for every launcher.

0 finished; 1 a failure, one line, as is standard output that could not be written,
after the work; 2 wrong arguments or configuration, before any work was done; 75
interrupted and saved, start again.
"""

import atexit
import contextlib
import functools
import logging as stdlib_logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import output

from personmae_jax.config import Config
from personmae_jax.config_values import check_types, field_paths, nearest_field
from personmae_jax.engine import signals
from personmae_jax.errors import ConfigError, RunError, first_line, quoted

Settings = TypeVar("Settings")

_kinds: tuple[type, ...] = (Config,)  # of what `--config` gives
_none: list[str] = []  # settings given as None, which ml_collections would parse


def define_config(
    *kinds: type[Settings], example: str = "configs/quickstart.py"
) -> Callable[[], Settings]:
    """Defines `--config` and its overrides; returns what reads them after parsing.

    What the file's `get_config()` returns is of one of `kinds`, as `example` does.
    """
    global _kinds
    _kinds = kinds
    flag = config_flags.DEFINE_config_file(
        "config",
        help_string="A file of configs/; --config.FIELD=VALUE overrides a setting of "
        "personmae_jax/config*.py.",
    )
    parser = flags.FLAGS["config"].parser
    parser.parse = functools.partial(_load, parser.parse)
    show("config")

    def read() -> Settings:
        if not flag.present:
            raise ConfigError(f"no --config: try --config={example}")
        kind = next(k for k in kinds if isinstance(flag.value, k))
        for path, _ in field_paths(kind()):
            *sections, name = path.split(".")
            with contextlib.suppress(AttributeError):  # `check_types` says it
                section = functools.reduce(getattr, sections, flag.value)
                value = None if path in _none else getattr(section, name)
                if type(value) is str and sections != ["init"]:  # as `_expand_home`
                    value = os.path.expanduser(value)
                setattr(section, name, value)
        check_types(flag.value)
        return flag.value

    return read


def _load(parse: Callable[[str], Any], argument: str) -> Any:
    """What `parse` loads of a stranger's file, which may do anything."""
    if not pathlib.Path(argument.split(":")[0]).is_file():
        raise ConfigError("there is no such file; see configs/")
    try:
        found = parse(argument)
    except BaseException as e:
        found = e.__context__ or e  # else a traceback of theirs
    found = getattr(found, "_error", found)  # where ml_collections keeps an OSError
    if isinstance(found, BaseException):
        what = f"{type(found).__name__}: {quoted(found, 300)}"
        raise ConfigError(f"it cannot be used: {what}") from found
    if not isinstance(found, _kinds):
        wanted = " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in _kinds)
        found = type(found).__name__
        raise ConfigError(f"get_config() returned {found}; it must return {wanted}")
    return found


def define_workdir() -> Callable[[], str]:
    """Defines `--workdir` of a run that `--config` names; returns what reads it."""
    flag = flags.DEFINE_string(
        "workdir",
        None,
        "Where the run lives, a folder or gs://...; runs/CONFIG if absent.",
    )
    show("workdir")
    return lambda: (
        f"runs/{config_file().stem}" if flag.value is None else str(flag.value)
    )


def define_numbers(
    name: str, kind: type[int] | type[float], count: int, words: str
) -> flags.FlagHolder[Any]:
    """Defines a flag of so many numbers, as 0.5,0.5,0.5 or 24x8; None if absent."""
    return flags.DEFINE(_Numbers(kind, count), name, None, words)


class _Numbers(flags.ArgumentParser):
    def __init__(self, kind: type[int] | type[float], count: int):
        self._kind, self._count = kind, count

    def parse(self, argument: Any) -> tuple[int | float, ...]:
        low = 1 if self._kind is int else 0
        with contextlib.suppress(ValueError):
            values = tuple(map(self._kind, re.split("[x,]", argument)))
            if len(values) == self._count and all(low <= x < 1000 for x in values):
                return values
        raise ValueError(f"it must be {self._count} numbers of at least {low}")


def show(*names: str) -> None:
    """Has --help of the command list flags that are defined elsewhere."""
    for name in names:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def define_cluster() -> Callable[[], dict[str, Any]]:
    """Defines the flags of `distributed.initialize`; returns what reads them."""
    holders = (
        flags.DEFINE_string(
            "coordinator", None, "HOST:PORT of process 0, where jax finds no cluster."
        ),
        flags.DEFINE_integer("num_processes", None, "With --coordinator: of the run."),
        flags.DEFINE_integer("process_id", None, "With --coordinator: this one's."),
    )
    show(*(holder.name for holder in holders))
    return lambda: {holder.name: holder.value for holder in holders}


def config_file() -> pathlib.Path:
    """Returns the file that `--config` names."""
    return pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))


def run(main: Callable[[], int | None], more_of: str | None = None) -> None:
    """Parses the flags, calls `main` and leaves with its exit code, None for 0.

    Further values of the repeated flag `more_of` may follow without its name.
    """
    output.guard()
    logging.set_verbosity(logging.FATAL)  # what ml_collections warns of is refused
    atexit.register(_end_here)  # the first one, hence called last
    # Until the launcher has something to save.
    signals.leave_at_once("interrupted before any work was done; start again")
    parse = functools.partial(_parse, more_of=more_of)
    sys.exit(app.run(lambda _: _guarded(main), flags_parser=parse))


def _parse(argv: list[str], more_of: str | None) -> list[str]:
    """Parses as absl does, but every mistake is one sentence and exit code 2."""
    try:
        argv = sys.argv = _last_of_each_setting([*map(_expand_home, argv)])
        flags.FLAGS.set_gnu_getopt(more_of is not None)
        rest = flags.FLAGS(argv)[1:]
        if more_of is not None and flags.FLAGS[more_of].present:
            flags.FLAGS[more_of].value = [*(flags.FLAGS[more_of].value or ()), *rest]
        elif rest:
            raise ConfigError(f"{rest[0]!r} is no flag; flags are --NAME=VALUE")
        for name in {"out", "workdir"} & {*flags.FLAGS}:
            given = flags.FLAGS[name].value or ""
            if os.fsencode(given) != given.encode(errors="replace"):
                raise ConfigError(
                    f"--{name}={given} is not read as UTF-8, which the libraries that "
                    "write there need; rename it, or set PYTHONUTF8=1 if it is"
                )
        return argv[:1]
    except SystemExit:  # --help; absl would leave with 1
        sys.exit(output.code_if_told(0, 2))
    except (ConfigError, flags.Error) as e:
        _leave(2, e)
    except Exception as e:  # what a stranger's config file returns may raise anything
        _leave(2, f"--config: {type(e).__name__}: {first_line(e)}")


def _expand_home(argument: str) -> str:
    """The argument with `~`, if its value begins so: shells leave it after a `=`."""
    name, is_given, value = argument.partition("=")
    if name.startswith("--config.init."):
        return argument  # read so too, and compared as it was given on resuming
    if is_given and name.startswith("-"):
        return f"{name}={os.path.expanduser(value)}"
    return os.path.expanduser(argument)


def refuse_inside(flag: str, folder: str | None, *inputs: str | None) -> None:
    """Raises ConfigError if what is written to `folder` would be read as input."""
    if folder is None or "://" in folder:
        return
    # Not Path.resolve: it raises where links go round.
    inside = pathlib.Path(os.path.realpath(os.path.expanduser(folder)))
    for path in filter(None, inputs):
        outside = pathlib.Path(os.path.realpath(os.path.expanduser(path)))
        if outside.is_dir() and inside.is_relative_to(outside):
            raise ConfigError(
                f"{flag}={folder} lies in {path}, whose files are read as data; name "
                "a folder outside of it"
            )


def _last_of_each_setting(argv: list[str]) -> list[str]:
    """The arguments without those that a later one overrides; refuses unknown settings.

    ml_collections, which reads sys.argv, would join the values of tuples, ignore an
    empty one, and know no setting before the file, so that all come last.
    """
    known = {path: default for kind in _kinds for path, default in field_paths(kind())}
    kept: dict[tuple[bool, str | int], str] = {}
    arguments = iter(enumerate(argv))
    for place, argument in arguments:
        name, is_given, _ = argument.lstrip("-").partition("=")
        path = name.removeprefix("config.").removeprefix("noconfig.")
        is_setting = argument.startswith("-") and path != name
        is_file = argument.startswith("-") and name == "config"
        if is_setting and path not in known:
            raise ConfigError(
                f"there is no setting --{name}; "
                f"did you mean --config.{nearest_field(known, path)}?"
            )
        if not is_given and (is_file or is_setting and type(known[path]) is not bool):
            argument += "=" + next(arguments, (0, ""))[1]  # --NAME VALUE
        if is_setting and argument.partition("=")[2].strip() == "()":
            raise ConfigError(f"--{name}=() is empty; give numbers: (8,) or (8,9)")
        kept[is_setting, path if is_setting or is_file else place] = argument
    given = {str(k): v.partition("=")[2] for (is_, k), v in kept.items() if is_}
    _none[:] = [path for path, value in given.items() if value == "None"]
    return [kept[k] for k in sorted(kept, key=lambda k: k[0]) if k[1] not in _none]


def _guarded(main: Callable[[], int | None]) -> int:
    if not flags.FLAGS["verbosity"].present:  # INFO is for orbax's and jax's developers
        logging.set_verbosity(logging.WARNING)
    # They tell with tracebacks what they raise as well, and we say in a sentence.
    logging.get_absl_logger().addFilter(lambda r: "orbax" not in r.pathname)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    sys.excepthook = _tell_uncaught
    try:
        return output.code_if_told(main() or 0, 1)
    except ConfigError as e:
        _leave(2, e)
    except RunError as e:
        _leave(1, e)
    except MemoryError as e:
        _leave(1, f"out of memory on the host ({first_line(e)}); use smaller settings")
    except (RuntimeError, AssertionError) as e:
        # Without the plugin of CUDA jax fails at an assertion.
        raised_in = traceback.extract_tb(e.__traceback__)[-1].filename
        if not raised_in.endswith("xla_bridge.py"):
            raise
        _leave(
            2,
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: there is no such "
            f"device, or jax has no plugin for it ({first_line(e)}); unset it, or "
            "pip install -r requirements-cuda.txt or requirements-tpu.txt",
        )


_failed: list[int] = []  # the exit code, if an error has been told


def _end_here() -> None:
    # Libraries' threads would tell, after our sentence, what they meet at the exit.
    if _failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_failed[0])


def _tell_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # Every write under way when a save failed tells so: hundreds of lines around ours.
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _leave(code: int, error: object) -> NoReturn:
    # A name, or a number of a stranger's file, may fill screens.
    text = re.sub(r"(\S{300})\S{300,}", r"\1...", str(error))
    print(f"error: {text}", file=sys.stderr, flush=True)
    if (jax := sys.modules.get("jax")) and jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError, AssertionError):  # there is no device
            if jax.process_count() > 1:
                os._exit(code)  # at exit jax waits for the others, or for their death
    _failed.append(code)
    # Python would wait for the threads of a failed save, which wait for one another.
    atexit._run_exitfuncs()  # the last one ends the process
    sys.exit(code)
