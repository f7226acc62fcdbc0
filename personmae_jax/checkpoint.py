"""Checkpoints of a run: saved in the background, restored on any devices."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from personmae_jax import revision
from personmae_jax.errors import Closing, ConfigError, RunError, first_line
from personmae_jax.storage import open_path
from personmae_jax.trees import named_leaves

_STATE = "state"  # folder of the state inside STEP/
_ENCODERS = {"student": ("params", "encoder"), "teacher": ("teacher_params",)}

State = TypeVar("State")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never asks: only the loop may.

        Orbax asks from its own thread with the number of the step it has just
        finished saving. That would set jax's step counter back, and a SIGTERM at
        that moment would be due at a step that the loop has passed.
        """
        return False


class Checkpoints(Closing):
    """The checkpoints WORKDIR/checkpoints/STEP/ of one run; a context manager.

    Keeps the latest `keep` and step 0. A checkpoint appears under its name only when
    it is whole, so a run may be killed at any moment. Beside the state, each carries
    the settings, the git revision and the versions of libraries
    (`custom_metadata` in STEP/_CHECKPOINT_METADATA).

    Every process of a run creates one and makes the same calls.
    """

    def __init__(self, workdir: epath.Path, *, keep: int, config: Mapping[str, Any]):
        """Creates the folder, and removes what a killed run left half-written.

        Args:
          workdir: Of a run that holds its lock.
          keep: How many of the latest to keep, at least 1.
          config: The settings, as `dataclasses.asdict` gives them.
        """
        policy = ocp.checkpoint_managers
        self._folder = workdir / "checkpoints"
        self._about = {
            "config": json.loads(json.dumps(config)),
            "git_revision": revision.git_revision(),
            "versions": revision.versions(),
        }
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(
                [policy.LatestN(keep), policy.CustomSteps([0])]
            ),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
        )
        try:
            self._manager = _Manager(self._folder, options=options)
        except Exception as e:  # each storage has its own errors
            raise RunError(
                f"{self._folder} cannot hold checkpoints ({first_line(e)}); mend that "
                "or use another --workdir"
            ) from e

    def latest_step(self) -> int | None:
        """The latest whole checkpoint; None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Starts saving; returns when the state's memory may be reused.

        Does nothing if `step` is saved already.

        Raises:
          RunError: This save could not start, or the one before has failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        self._report_failure(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(**{_STATE: ocp.args.StandardSave(state)}),
                custom_metadata=self._about,
                force=True,  # the loop decides when
            )
        )

    def restore(self, abstract_state: State, step: int | None = None) -> State:
        """Returns the state saved at `step`, by default the latest.

        Args:
          abstract_state: `jax.ShapeDtypeStruct` leaves whose shardings say where the
            restored arrays go; the devices may be others than at saving.
          step: Of the checkpoint.

        Raises:
          RunError: There is no such checkpoint, it is damaged, or its arrays have
            other names, shapes or dtypes.
        """
        self.wait()
        step = _find_step(self._folder, step)
        folder = self._folder / str(step)
        _compare(_read_structure(folder), abstract_state, folder)
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract_state)})
        try:
            return self._manager.restore(step, args=args)[_STATE]
        except Exception as e:  # orbax and tensorstore raise whatever they meet
            raise _damaged(folder, e) from e

    def reached_preemption(self, step: int) -> bool:
        """Whether this is the step after which all hosts save and leave.

        Call it once at every step, on every host. True once a SIGTERM has reached one
        of them and they have agreed on the step; needs `distributed.initialize`.
        """
        return multihost_utils.reached_preemption_sync_point(step)

    def wait(self) -> None:
        """Waits until the last save is on storage; raises RunError if it failed."""
        self._report_failure(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, then frees the threads; raises RunError if the last save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # repeats what `wait` has told
                self._manager.close()

    def _report_failure(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as e:  # orbax and tensorstore raise whatever they meet
            logging.debug("Saving failed.", exc_info=True)
            whole = _whole_steps(self._folder)
            raise RunError(
                f"a checkpoint could not be saved in {self._folder} "
                f"({_explain(e)}); mend that and start again: older checkpoints are "
                f"still good: {', '.join(map(str, whole)) or 'none'}"
            ) from e


def restore_encoder(
    workdir: os.PathLike[str] | str,
    step: int | None = None,
    weights: str = "student",
) -> dict[str, Any]:
    """Returns the encoder's parameters as numpy arrays, reading nothing else.

    Needs no knowledge of the optimizer, and creates nothing in the workdir.

    Args:
      workdir: Of a run, finished or not.
      step: Of the checkpoint; by default the latest.
      weights: "student", or "teacher" for its moving average.

    Raises:
      ConfigError: `weights` is neither.
      RunError: There is no such checkpoint, or it is damaged.
    """
    if weights not in _ENCODERS:
        raise ConfigError(
            f"weights={weights!r} is unknown; choose one of {', '.join(_ENCODERS)}"
        )
    path = _ENCODERS[weights]
    folder = open_path(workdir) / "checkpoints"
    folder = folder / str(_find_step(folder, step))
    structure = _read_structure(folder)
    try:
        for name in path:
            structure = structure[name]
        wanted = structure
        for name in reversed(path):
            wanted = {name: wanted}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            params = checkpointer.restore(
                folder / _STATE,
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
                    ),
                    partial_restore=True,
                ),
            )
    except Exception as e:  # orbax and tensorstore raise whatever they meet
        raise _damaged(folder, e) from e
    for name in path:
        params = params[name]
    return params


def describe(
    workdir: os.PathLike[str] | str, step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint, by default the latest, and what it says of itself.

    That is what `Checkpoints` saved beside the state: the settings, the git revision
    (None where there was none) and the versions of libraries.

    Raises:
      RunError: There is no such checkpoint, or it is damaged.
    """
    folder = open_path(workdir) / "checkpoints"
    folder = folder / str(_find_step(folder, step))
    try:
        metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
        about = metadata["custom_metadata"]
        keys = ("config", "git_revision", "versions")
        return int(folder.name), {key: about[key] for key in keys}
    except Exception as e:  # each storage has its own errors
        raise _damaged(folder, e) from e


def has_checkpoint(workdir: os.PathLike[str] | str) -> bool:
    """Whether a run in `workdir` would be resumed; creates nothing."""
    return bool(_whole_steps(open_path(workdir) / "checkpoints"))


def _whole_steps(folder: epath.Path) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def _find_step(folder: epath.Path, step: int | None) -> int:
    steps = _whole_steps(folder)
    if not steps or step not in (None, *steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        there = f"; there are steps {', '.join(map(str, steps))}" if steps else ""
        raise RunError(f"{folder} has no whole {wanted}{there}")
    return steps[-1] if step is None else step


def _read_structure(folder: epath.Path) -> dict[str, Any]:
    """Shapes and dtypes in STEP/ as nested dicts and lists."""
    try:
        # A Checkpointer would warn: it looks for the metadata of STEP/ in here too.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(folder / _STATE).tree
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    except Exception as e:  # orbax and tensorstore raise whatever they meet
        raise _damaged(folder, e) from e


def _compare(saved: PyTree, wanted: PyTree, folder: epath.Path) -> None:
    """Raises RunError listing every array in which they differ."""
    there, here = _describe_leaves(saved), _describe_leaves(wanted)
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


def _damaged(folder: epath.Path, error: Exception) -> RunError:
    older = [s for s in _whole_steps(folder.parent) if s < int(folder.name)]
    mend = f"remove it to go on from step {older[-1]}" if older else "start a new run"
    return RunError(f"{folder} cannot be read ({_explain(error)}); {mend}")


def _explain(error: BaseException) -> str:
    """The cause, short; tensorstore's messages are long and end in source lines."""
    text = str(error)
    for cause in ("No space left on device", "File too large", "Disk quota exceeded"):
        if cause in text:
            return cause
    return first_line(error)[:300]
