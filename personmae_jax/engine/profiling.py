"""A trace of a few steps for TensorBoard's profile page."""

import contextlib
import pathlib
import tempfile

import jax
from etils import epath
from jaxtyping import PyTree

from personmae_jax.config import ProfileConfig
from personmae_jax.engine.storage import copy_folder
from personmae_jax.errors import Closing


class Trace(Closing):
    """Records `num_steps` steps from `start_step` on; a context manager.

    Only the process that is given a `workdir` records. The trace lies in
    WORKDIR/tensorboard/plugins/profile/TIME/.
    """

    def __init__(self, cfg: ProfileConfig, workdir: epath.Path | None):
        """Records nothing yet."""
        super().__init__()
        self._target = None if workdir is None else workdir / "tensorboard"
        first = None if workdir is None else cfg.start_step
        self._steps = range(0) if first is None else range(first, first + cfg.num_steps)

    def before(self, step: int) -> None:
        """Starts recording if `step` is the first one; call it before each step."""
        if self._target is not None and self._steps and step == self._steps[0]:
            self._closing.enter_context(_record(self._target))

    def after(self, step: int, outputs: PyTree) -> None:
        """Stops once the `outputs` of the last one are there; call it after each."""
        if self._steps and step == self._steps[-1]:
            jax.block_until_ready(outputs)
            self._closing.close()


@contextlib.contextmanager
def _record(target: epath.Path):
    """Records while open, on local disk; then copies, for `target` may be gs://."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield
        copy_folder(pathlib.Path(folder), target)
