"""What a training hands to the loop: its program, its data, what to score and show."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt8

from personmae_jax.data.batches import Batch, HostBatches
from personmae_jax.engine.program import Program
from personmae_jax.errors import RunError

# An encoder's parameters as numpy arrays, None if they are to be random, and
# sentences on them.
Start = tuple[dict[str, Any] | None, tuple[str, ...]]


@runtime_checkable
class Scorer(Protocol):
    """Scores a state by a task; every host calls it alike and gets the same."""

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint is kept for its score; None: none ever is."""
        ...

    def restore(self, workdir: epath.Path, step: int) -> None:
        """Takes up what a run that is resumed at `step` was scored before."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether to score after `step`; 0 is before the first."""
        ...

    def __call__(self, step: int, state: Any) -> Mapping[str, int | float]:
        """Returns the scores by name, for the row of `step`."""
        ...


class RoundError(RunError):
    """A round cannot be made, as every host finds; what was trained before is good."""


@runtime_checkable
class Rounds(Protocol):
    """Data that a training makes anew while it runs, such as pseudo labels.

    What a round learns is kept in the state, so that a run resumed in mid-round goes
    on with it.
    """

    def begins(self, step: int) -> bool:
        """Whether the data changes before `step`, which is 1 or more."""
        ...

    def open(
        self, step: int, state: Any
    ) -> tuple[Any, HostBatches, Mapping[str, int | float]]:
        """Called before `step` if a round begins there, or if the run resumes there.

        Returns:
          The state with what this round learns, unchanged in mid-round; the batches;
          and numbers for a row, empty in mid-round.

        Raises:
          RoundError: See there.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What a training hands to the loop."""

    program: Program
    data: Mapping[str, Any]  # facts of the data set, as `Workdir` takes them
    about: str  # the data, in a few words, for the first line of the log
    start: Callable[[], Start]  # called for a new run only
    batches: HostBatches | Rounds  # of this host: over the whole run, or in rounds
    summary: Callable[[epath.Path], str]  # for a person after a finished run
    scorer: Scorer | None = None  # of states while it runs; None: nothing is scored
    # (step, state) -> picture, every `config.log.pictures_every_steps` and at the end.
    draw: Callable[[int, Any], UInt8[np.ndarray, "h w 3"]] | None = None
    # Counts of this host's batch for its row, which are added over the hosts.
    count_images: Callable[[Batch], Mapping[str, int]] = lambda _: {}
    # Is shown each row that is written.
    warn: Callable[[int, Mapping[str, Any]], None] = lambda *_: None
    keep_initial: bool = False  # step 0, the untrained network, is a checkpoint, too
    memory_hint: str  # what else saves memory on the devices
