"""The files of a checkpoint: which are there, what is in them, and what is wrong."""

import contextlib
import hashlib
import json
import math
import re
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import PyTree

from personmae_jax.engine.storage import open_to_read, read_whole
from personmae_jax.engine.trees import named_leaves
from personmae_jax.errors import ConfigError, RunError, first_line

STATE = "state"  # folder of the state inside STEP/
_DIGESTS = "digests.json"  # inside that
_ABOUT = "_CHECKPOINT_METADATA"  # inside STEP/
_OF = "about.json"  # inside the state's folder: what it is of
_MAX_JSON = 1 << 26  # bytes of a description; ours have 1 MB at most
# Weights hardly compress, but a teacher without training and Adam's first moments do.
_MAX_RATIO, _SMALL = 100, 1 << 30  # bytes in memory for one on storage; never refused
# What tensorstore says of bytes that are wrong or gone, not of a read that failed.
_DAMAGE = re.compile("DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION")


class HashedState(ocp.StandardCheckpointHandler):
    """Writes the SHA-256 of every file of the state beside them, and of what it is of.

    Orbax calls `finalize` in the background, on the main process, when all processes
    have written and before the checkpoint takes its name: so none is ever without.
    Files are hashed rather than arrays, since then a flipped bit of the index is
    found as well, and no process needs an array that others hold.
    """

    def __init__(self, about: dict[str, Any]):
        """`about` is the `custom_metadata` that orbax saves beside the state."""
        super().__init__()
        self._about = about

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        # In a file of our own, since orbax's is written by a thread that may be late.
        step = directory.parent.name.partition(".")[0]  # of STEP.tmp, too
        of = {"step": step, "custom_metadata": self._about}
        (directory / _OF).write_text(json.dumps(of))
        text = json.dumps(_digests(directory, _files(directory)), indent=0)
        (directory / _DIGESTS).write_text(text)


def verify(folder: epath.Path) -> None:
    """Raises RunError unless the files in STEP/ are those that were written.

    A checkpoint of an earlier version has no digests, and passes.
    """
    state = folder / STATE
    try:
        if not (state / _DIGESTS).exists():
            logging.log_first_n(
                logging.WARNING,
                "%s is of an earlier version, without digests: damage may not show",
                1,
                folder,
            )
            return
        wanted = _read_json(state / _DIGESTS)
        if not wanted or any(".." in name or name[0] == "/" for name in wanted):
            raise LookupError(f"{_DIGESTS} does not name the files beside it")
        _check_bound(folder, wanted)
        found = _digests(state, list(wanted))  # a lost one raises
        if wrong := [name for name in wanted if found[name] != wanted[name]]:
            raise LookupError(f"{wrong[0]} is not what was written for this step")
    except Exception as e:  # each storage has its own errors
        raise damaged(folder, e) from e


def _files(directory: epath.Path, prefix: str = "") -> list[str]:
    names = []  # by hand, since etils has no rglob: it would be dear on gs://
    for path in directory.iterdir():
        name = prefix + path.name
        names += _files(path, name + "/") if path.is_dir() else [name]
    return names


def _check_bound(folder: epath.Path, wanted: dict[str, str]) -> None:
    """Raises LookupError if the state in STEP/ is of another step or other settings.

    Takes the digest by which earlier versions told that out of `wanted`.
    """
    about = _read_json(folder / _ABOUT).get("custom_metadata")
    if _OF in wanted:
        of = _read_json(folder / STATE / _OF)
        # Orbax's own may be missing, where its thread failed.
        if of["step"] != folder.name or about not in (None, {}, of["custom_metadata"]):
            raise LookupError(f"{_ABOUT} is not what was written for this step")
        return
    texts = (json.dumps([folder.name, a], sort_keys=True) for a in (about, {}))
    # The latter's, if that thread was late.
    known = {hashlib.sha256(text.encode()).hexdigest() for text in texts}
    if wanted.pop(_ABOUT, None) not in (None, *known):
        raise LookupError(f"{_ABOUT} is not what was written for this step")


def _digests(directory: epath.Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with open_to_read(directory / name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with futures.ThreadPoolExecutor() as pool:  # hashlib releases the lock
        return dict(zip(names, pool.map(digest, names), strict=True))


# Arrays that earlier versions wrote and that nothing reads any more.
_DROPPED = {"target_mean"}


def restore_part(folder: epath.Path, wanted: Any, kinds: PyTree = None) -> Any:
    """Reads those arrays of STEP/ alone whose structure is `wanted`.

    `kinds` are their `ocp.RestoreArgs`; None for numpy. Every process calls it.
    """
    if kinds is None:
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(
                folder / STATE,
                args=ocp.args.PyTreeRestore(
                    item=wanted, restore_args=kinds, partial_restore=True
                ),
            )
    except Exception as e:  # orbax and tensorstore raise whatever they meet
        raise damaged(folder, e) from e


def whole_steps(folder: epath.Path) -> list[int]:
    """The steps of all whole checkpoints in a folder, which need not be there."""
    try:
        return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []
    except Exception as e:  # each storage has its own errors
        raise RunError(
            f"{folder} cannot be listed ({explain(e)}); fix the access to it"
        ) from e


def read_about(folder: epath.Path) -> dict[str, Any]:
    """What `Checkpoints` saved beside the state in STEP/."""
    try:
        own = folder / STATE / _OF  # none of earlier versions has it
        file = own if own.exists() else folder / _ABOUT
        about = _read_json(file)["custom_metadata"]
        kinds = {"config": dict, "git_revision": str | None, "versions": dict}
        if wrong := [k for k, kind in kinds.items() if not isinstance(about[k], kind)]:
            raise LookupError(f"{file.name} has no {wrong[0]} of a run")
        return {key: about[key] for key in kinds}
    except Exception as e:  # each storage has its own errors
        raise damaged(folder, e) from e


def find_step(folder: epath.Path, step: int | None) -> int:
    """Returns `step`, the latest for None; raises ConfigError if it is not there."""
    steps = whole_steps(folder)
    if not steps or step not in (None, *steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        there = f"; there are steps {', '.join(map(str, steps))}" if steps else ""
        raise ConfigError(f"{folder} has no whole {wanted}{there}")
    return steps[-1] if step is None else step


def read_structure(folder: epath.Path) -> dict[str, Any]:
    """Shapes and dtypes in STEP/, whose files are verified, as nested dicts."""
    verify(folder)
    try:
        # A Checkpointer would warn: it looks for the metadata of STEP/ in here too.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(folder / STATE).tree
        _check_size(folder / STATE, tree)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    except Exception as e:  # orbax and tensorstore raise whatever they meet
        raise damaged(folder, e) from e


def _check_size(state: epath.Path, tree: PyTree) -> None:
    """Raises LookupError if arrays of far more bytes are named than there can be."""
    named = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    if named > _SMALL:
        there = sum((state / name).stat().length for name in _files(state))
        if named > _MAX_RATIO * there:
            raise LookupError(f"arrays of {named:.0e} bytes in files of {there}")


def _read_json(file: epath.Path) -> Any:
    data = read_whole(file, _MAX_JSON)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise LookupError(f"{file.name} is no JSON") from e


def compare(saved: PyTree, wanted: PyTree, folder: epath.Path) -> None:
    """Raises RunError listing every array in which they differ.

    Arrays that only earlier versions had may be there; they are not read.
    """
    there, here = _describe_leaves(saved), _describe_leaves(wanted)
    for name in _DROPPED - here.keys():
        there.pop(name, None)
    wrong = [
        f"{name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise RunError(
            f"{folder} does not fit this code and configuration "
            f"({'; '.join(wrong[:10])}{more}); use those it was saved with "
            "or another --workdir"
        )


def _describe_leaves(tree: PyTree) -> dict[str, str]:
    return {
        name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for name, leaf in named_leaves(tree).items()
    }


def damaged(folder: epath.Path, error: Exception) -> RunError:
    """What to raise where STEP/ cannot be read: damaged, as far as we know, or not."""
    about_content = (LookupError, TypeError, UnicodeError, json.JSONDecodeError)
    is_damage = isinstance(error, (*about_content, FileNotFoundError))
    if not is_damage and not _DAMAGE.match(str(error)):
        return RunError(
            f"{folder} cannot be read ({explain(error)}); it may well be whole: "
            "fix the access to it and start again, and remove nothing"
        )
    if not folder.exists():
        return RunError(
            f"{folder} was removed while it was read, as a run does with its older "
            "checkpoints; start again"
        )
    older = [s for s in whole_steps(folder.parent) if s < int(folder.name)]
    hint = "start a new run"
    if older:
        hint = f"move it elsewhere to go on from step {older[-1]}"
    return RunError(f"{folder} is damaged ({explain(error)}); {hint}")


def explain(error: BaseException) -> str:
    """The cause, short; tensorstore's messages are long and end in source lines."""
    text = str(error)
    for cause in ("No space left on device", "File too large", "Disk quota exceeded"):
        if cause in text:
            return cause
    return first_line(error)[:300]
