"""Metric rows of a run: pending steps, the check that they are finite, the rows due."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree, UInt8

from personmae_jax import sharding
from personmae_jax.data.batches import Batch
from personmae_jax.engine.metrics import MetricsWriter, params_sha256
from personmae_jax.engine.progress import Progress
from personmae_jax.engine.training import Training
from personmae_jax.errors import Closing, RunError

Scores = Mapping[str, int | float]


@dataclasses.dataclass
class _Step:
    """A step that was dispatched; its metrics may still be on their way."""

    step: int
    metrics: Mapping[str, Any]
    counts: Mapping[str, int]  # of this host's rows
    data_seconds: float  # the loop waited for this host's rows
    done_at: float = math.nan  # seconds of training
    scores: Scores = dataclasses.field(default_factory=dict)


class Rows(Closing):
    """Keeps metrics on the device until a row is due; a context manager.

    Every process of a run makes the same calls; the one that is given a `workdir`
    writes.
    """

    def __init__(self, training: Training, workdir: epath.Path | None, start: int):
        """Opens the files of the run; rows after step `start` are cut off."""
        super().__init__()
        self._training, self._program = training, training.program
        self._pending: list[_Step] = []
        self._numbers: Scores = {}  # for the row of the next step
        self._paused = 0.0  # seconds so far
        self._row_step, self._row_time = start, self._now()
        self._shown = ""  # of the latest scores
        self._writer = self._progress = None
        if workdir is not None:
            enter = self._closing.enter_context
            self._writer = enter(MetricsWriter(workdir, start))
            self._progress = enter(Progress(self._program.num_steps, start))

    def note(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        batch: Batch,
        data_seconds: float,
    ) -> None:
        """Takes note of a step just dispatched; writes the rows before it if due.

        Waits for the step before it, so that at most two are in flight.

        Raises:
          RunError: An earlier loss was not finite, or too many images are bad.
        """
        try:
            counts = self._training.count_images(batch)
        except RunError:
            if jax.process_count() == 1:  # other hosts would be waited for, in vain
                self.write()  # the rows before it explain it
            raise
        if self._pending:
            self._wait()
            if self._is_due(step - 1):
                self.write()
        self._pending.append(
            _Step(step, metrics, counts, data_seconds, scores=self._numbers)
        )
        self._numbers = {}

    def check(self) -> None:
        """Waits for all steps noted.

        Raises:
          RunError: A loss or a norm is not finite; names the first such step.
        """
        if not self._pending:
            return
        self._wait()
        fetched = jax.device_get([p.metrics for p in self._pending])
        for p, metrics in zip(self._pending, fetched, strict=True):
            p.metrics = metrics
            for name, value in metrics.items():
                if not np.isfinite(value):
                    lr = getattr(self._program.cfg.optim, "lr", None)
                    rate = "base_lr" if lr is None else "lr"
                    raise RunError(
                        f"step {p.step}: {name} is {float(value)}; the last checkpoint "
                        "is from before it, but the same settings lead here again: "
                        "start in another --workdir with a smaller "
                        f"--config.optim.{rate}, with --config.optim.clip_norm=1 or "
                        "--config.train.matmul_dtype=float32"
                    )

    def write(self, final_params: PyTree = None) -> None:
        """Checks every step noted so far and writes the rows that are due.

        Rows are due every `log.every_steps`, at the first and the last step, and
        wherever an image was bad or there are scores. The last one carries the hash of
        `final_params`.

        Raises:
          RunError: A loss or a norm is not finite; names the first such step.
        """
        self.check()
        pending, self._pending = self._pending, []
        counts = _sum_over_hosts([p.counts for p in pending])
        for p, count in zip(pending, counts, strict=True):
            if self._is_due(p.step) or count.get("bad_images") or p.scores:
                self._write_row(p, {**p.metrics, **count, **p.scores}, final_params)

    def add_scores(self, step: int, make_scores: Callable[[], Scores]) -> None:
        """Adds scores to the row of `step`, noted last; they take no time off it.

        With none noted, as before the first, they get a row of their own.

        Raises:
          RunError: A loss or a norm is not finite: nothing is scored then.
        """
        with self.paused():
            scores = make_scores()
        if "retrieval_mAP" in scores:
            mean_ap, rank1 = scores["retrieval_mAP"], scores["retrieval_rank1"]
            self._shown = f"mAP {mean_ap:.3f}  rank-1 {rank1:.3f}  "
        if self._pending:
            self._pending[-1].scores = {**self._pending[-1].scores, **scores}
        elif self._writer is not None:
            self._writer.write(step, scores)

    def add_to_next(self, numbers: Scores) -> None:
        """Adds numbers to the row of the step that is noted next, which is due then."""
        self._numbers = numbers

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside takes no time off the images per second.

        Raises:
          RunError: A loss or a norm of a step before is not finite.
        """
        self.check()
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def write_picture(self, step: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes pictures/STEP.png; raises RunError if the disk is full."""
        if self._writer is not None:
            self._writer.write_picture(step, picture)

    def flush(self) -> None:
        """Brings all rows to storage; call it before a checkpoint newer than they."""
        if self._writer is not None:
            self._writer.flush()

    def _wait(self) -> None:
        jax.block_until_ready(self._pending[-1].metrics)
        if math.isnan(self._pending[-1].done_at):
            self._pending[-1].done_at = self._now()

    def _now(self) -> float:
        """Seconds of training, on a clock that stands still while paused."""
        return time.monotonic() - self._paused

    def _is_due(self, step: int) -> bool:
        every, last = self._program.cfg.log.every_steps, self._program.num_steps
        return step % every == 0 or step in (1, last)

    def _write_row(
        self, p: _Step, values: Mapping[str, Any], final_params: PyTree
    ) -> None:
        num_images = (p.step - self._row_step) * self._program.batch_size
        images_per_second = num_images / max(p.done_at - self._row_time, 1e-9)
        self._row_step, self._row_time = p.step, p.done_at
        row = {
            **values,
            "images_per_second": images_per_second,
            "data_seconds": p.data_seconds,
        }
        if p.step == self._program.num_steps:
            row["params_sha256"] = params_sha256(final_params)
        if self._writer is not None and self._progress is not None:
            self._training.warn(p.step, row)
            self._writer.write(p.step, row)
            text = f"loss {float(values['loss']):.4f}  {self._shown}"
            self._progress.show(p.step, f"{text}{images_per_second:,.0f} images/s")


def _sum_over_hosts(counts: Sequence[Mapping[str, int]]) -> Sequence[Mapping[str, int]]:
    if jax.process_count() == 1 or not any(counts):
        return counts
    values = np.asarray([list(count.values()) for count in counts])
    totals = sharding.gather_processes(values).sum(axis=0)
    return [
        dict(zip(count, total, strict=True))
        for count, total in zip(counts, totals.tolist(), strict=True)
    ]
