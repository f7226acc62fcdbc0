"""Checkpoints of a run: saved in the background, restored on any devices."""

import contextlib
import functools
import json
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from personmae_jax.engine import checkpoint_files as files
from personmae_jax.engine import distributed, revision
from personmae_jax.engine.storage import open_path
from personmae_jax.errors import Closing, ConfigError, RunError, first_line

_REMOVED = "removed"  # folder of what is on its way out
_ENCODERS = {"student": ("params", "encoder"), "teacher": ("teacher_params",)}

State = TypeVar("State")


class _Manager(ocp.CheckpointManager):
    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        # After a failed save process 0 would wait at its barrier for the others, who
        # wait for the save: 20 minutes.
        vars(self)["_save_progress_tracker"].set = lambda _: None

    def reached_preemption(self, step: int) -> bool:
        """Never asks: only the loop may.

        Orbax asks from its own thread with the number of the step it has just
        finished saving. That would set jax's step counter back, and a SIGTERM at
        that moment would be due at a step that the loop has passed.
        """
        return False

    def _finalize(self, step: int, steps_to_remove: list[int]) -> None:
        super()._finalize(step, steps_to_remove)
        _empty_removed(self.directory)  # here, since this thread is no step's


def _empty_removed(folder: epath.Path) -> None:
    if jax.process_index() != 0:
        return
    try:
        if (folder / _REMOVED).exists():
            (folder / _REMOVED).rmtree()
    except Exception as e:  # each storage has its own errors; the next save tries again
        logging.warning("%s cannot be removed: %s", folder / _REMOVED, e)


def _handlers(about: dict[str, Any]) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = files.HashedState(about)
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
        registry.add(files.STATE, args, handler)
    return registry


class _Pinned(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoints of `steps`, which may change."""

    def __init__(self):
        self.steps = {0}

    def should_preserve(self, checkpoints, *, context):
        return [info.step in self.steps for info in checkpoints]


class Checkpoints(Closing):
    """The checkpoints WORKDIR/checkpoints/STEP/ of one run; a context manager.

    Keeps the latest `keep`, step 0 and one that is pinned. A checkpoint appears under
    its name only when it is whole, so a run may be killed at any moment. Beside the
    state, each carries the settings, the git revision and the versions of libraries
    (`custom_metadata` in STEP/_CHECKPOINT_METADATA).

    Every process of a run creates one and makes the same calls.
    """

    def __init__(self, workdir: epath.Path, *, keep: int, config: Mapping[str, Any]):
        """Creates the folder, and removes what a killed run left half-written."""
        policy = ocp.checkpoint_managers
        self._folder, self._keep = workdir / "checkpoints", keep
        self._about = {
            "config": json.loads(json.dumps(config)),
            "git_revision": revision.git_revision(),
            "versions": revision.versions(),
        }
        self._pinned = _Pinned()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(
                [policy.LatestN(keep), self._pinned]
            ),
            cleanup_tmp_directories=True,
            # Removing takes a while: a run killed meanwhile would leave a part that
            # looks whole. On object storage the commit mark is removed first.
            todelete_subdir=_REMOVED,
            lightweight_initialize=True,
            enable_should_save_is_saving_in_progress_check=False,
            # Else a process whose network disk is late resumes from another step.
            single_host_load_and_broadcast=True,
        )
        try:
            self._manager = _Manager(
                self._folder, options=options, handler_registry=_handlers(self._about)
            )
            _empty_removed(self._folder)
        except Exception as e:  # each storage has its own errors
            raise RunError(
                f"{self._folder} cannot hold checkpoints ({first_line(e)}); fix that "
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
                args=ocp.args.Composite(**{files.STATE: ocp.args.StandardSave(state)}),
                custom_metadata=self._about,
                force=True,  # the loop decides when
            )
        )

    def pin(self, step: int) -> None:
        """Keeps this step, whatever its age, until another one is pinned."""
        self._pinned.steps = {0, step}

    def prune(self) -> None:
        """Removes what a run killed right after its last save left beyond `keep`."""
        steps = sorted(self._manager.all_steps())
        for step in {*steps[: -self._keep]} - self._pinned.steps:
            self._manager.delete(step)
        _empty_removed(self._folder)

    def restore(self, abstract_state: State, step: int | None = None) -> State:
        """Returns the state saved at `step`, by default the latest.

        The shardings of `abstract_state` say where the restored arrays go; the devices
        may be others than at saving.

        Raises:
          ConfigError: There is no such checkpoint.
          RunError: It is damaged, or its arrays have other names, shapes or dtypes.
        """
        self.wait()
        step = files.find_step(self._folder, step)
        folder = self._folder / str(step)
        files.compare(files.read_structure(folder), abstract_state, folder)
        kinds = ocp.checkpoint_utils.construct_restore_args(abstract_state)
        return files.restore_part(folder, abstract_state, kinds)

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
            with jax.transfer_guard("allow"):  # orbax fetches the state implicitly
                act()
        except Exception as e:  # orbax and tensorstore raise whatever they meet
            logging.debug("Saving failed.", exc_info=True)
            is_storage = not isinstance(e, jax.errors.JaxRuntimeError)  # same words
            if not is_storage and (lost := distributed.lost_process(e)):
                raise lost from e
            whole = files.whole_steps(self._folder)
            raise RunError(
                f"a checkpoint could not be saved in {self._folder} "
                f"({files.explain(e)}); fix that and start again: older checkpoints "
                f"are still good: {', '.join(map(str, whole)) or 'none'}"
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
      ConfigError: `weights` is neither, or there is no such checkpoint.
      RunError: It is damaged.
    """
    if weights not in _ENCODERS:
        raise ConfigError(
            f"weights={weights!r} is unknown; choose one of {', '.join(_ENCODERS)}"
        )
    path = _ENCODERS[weights]
    folder = _folder_of(workdir, step)
    structure = files.read_structure(folder)
    if path[0] not in structure:
        raise ConfigError(f"the run in {workdir} has no {weights}: it was fine-tuned")
    try:
        wanted = functools.reduce(operator.getitem, path, structure)
    except KeyError as e:
        raise files.damaged(folder, e) from e
    for name in reversed(path):
        wanted = {name: wanted}
    return functools.reduce(operator.getitem, path, files.restore_part(folder, wanted))


def restore_head(
    workdir: os.PathLike[str] | str, step: int | None = None
) -> dict[str, Any]:
    """Returns what stands on the encoder of a fine-tuned run, as numpy arrays.

    Returns:
      The `params` but for the encoder's, and the batch norm's `statistics`.

    Raises:
      ConfigError: The run was not fine-tuned, or there is no such checkpoint.
      RunError: It is damaged.
    """
    folder = _folder_of(workdir, step)
    structure = files.read_structure(folder)
    if "statistics" not in structure:
        raise ConfigError(f"the run in {workdir} was not fine-tuned: it has no head")
    params = {k: v for k, v in structure["params"].items() if k != "encoder"}
    wanted = {"params": params, "statistics": structure["statistics"]}
    return files.restore_part(folder, wanted)


def describe(
    workdir: os.PathLike[str] | str, step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint, by default the latest, and what it says of itself.

    That is the settings, the git revision (None where there was none) and versions.

    Raises:
      ConfigError: There is no such checkpoint.
      RunError: It is damaged.
    """
    folder = _folder_of(workdir, step)
    return int(folder.name), files.read_about(folder)


def has_checkpoint(workdir: os.PathLike[str] | str) -> bool:
    """Whether a run in `workdir` would be resumed; creates nothing."""
    return bool(files.whole_steps(open_path(workdir) / "checkpoints"))


def _folder_of(workdir: os.PathLike[str] | str, step: int | None) -> epath.Path:
    folder = open_path(workdir) / "checkpoints"
    return folder / str(files.find_step(folder, step))
