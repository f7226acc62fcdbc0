"""What a run says of itself while it trains: rows, warnings, pictures, a summary."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from personmae_jax import sharding
from personmae_jax.data.bad_records import BadRecords
from personmae_jax.data.pipeline import Batch, Example, PretrainBatches
from personmae_jax.data.records import Records
from personmae_jax.engine import pictures
from personmae_jax.engine.metrics import MetricsWriter, params_sha256, read_rows
from personmae_jax.engine.progress import Progress
from personmae_jax.errors import RunError
from personmae_jax.pretrain.experiment import Experiment

Scores = Mapping[str, float]

_COLLAPSED = 0.1  # a teacher_std below it is said; ours
_LEARNT = 0.2  # a last feature_explained below it is said; ours
_SUMMARISED = (
    *("pixel_loss", "feature_loss", "feature_explained", "teacher_std"),
    # The first are of the untrained network.
    *("retrieval_mAP", "retrieval_rank1", "occluded_mAP"),
)


@dataclasses.dataclass(kw_only=True)
class _Step:
    """A step that was dispatched; its metrics may still be on their way."""

    step: int
    metrics: Mapping[str, jax.Array]
    counts: dict[str, int]  # of this host's rows
    data_seconds: float  # the loop waited for this host's rows
    done_at: float = math.nan  # monotonic seconds
    resumed_at: float = -math.inf  # after its scores were made
    scores: Scores = dataclasses.field(default_factory=dict)


class Report:
    """Keeps metrics on the device until a row is due; a context manager.

    Every process of a run makes the same calls; the one that is given a `workdir`
    writes.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: epath.Path | None,
        records: Records,
        batches: PretrainBatches,
        start: int,
    ):
        """Opens the files of the run; rows after step `start` are cut off."""
        self._experiment = experiment
        self._batches = batches
        self._bad = BadRecords(records, experiment.cfg.data.max_bad_fraction)
        self._pending: list[_Step] = []
        self._row_step, self._row_time = start, time.monotonic()
        self._examples: list[Example] = []
        self._has_warned = False
        self._shown = ""  # of the latest scores
        self._closing = contextlib.ExitStack()
        self._writer = self._progress = None
        if workdir is not None:
            enter = self._closing.enter_context
            self._writer = enter(MetricsWriter(workdir, start))
            self._progress = enter(Progress(experiment.num_steps, start))

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def note(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        rows: Batch,
        data_seconds: float,
    ) -> None:
        """Takes note of a step just dispatched; writes the rows before it if due.

        Waits for the step before it, so that at most two are in flight.

        Args:
          step: Number of updates after it.
          metrics: Of the train step, on the devices.
          rows: This host's part of the batch.
          data_seconds: How long the loop waited for them.

        Raises:
          RunError: An earlier loss was not finite, or too many images are bad.
        """
        try:
            counts = self._bad.count(rows["record"], rows["outcome"])
        except RunError:
            if jax.process_count() == 1:  # other hosts would be waited for, in vain
                self.write()  # the rows before it explain it
            raise
        if self._pending:
            self._wait()
            if self._is_due(step - 1):
                self.write()
        self._pending.append(
            _Step(step=step, metrics=metrics, counts=counts, data_seconds=data_seconds)
        )

    def write(self, final_params: PyTree = None) -> None:
        """Checks every step noted so far and writes the rows that are due.

        Rows are due every `log.every_steps`, at the first and the last step, and
        wherever an image was bad or the networks were evaluated.

        Args:
          final_params: After the last step of the run: its row carries their hash.

        Raises:
          RunError: A loss or a norm is not finite; names the first such step.
        """
        if not self._pending:
            return
        self._wait()
        pending, self._pending = self._pending, []
        fetched = jax.device_get([p.metrics for p in pending])
        counts = _sum_over_hosts([p.counts for p in pending])
        for p, metrics, count in zip(pending, fetched, counts, strict=True):
            check_finite(p.step, metrics)
            if self._is_due(p.step) or count["bad_images"] or p.scores:
                self._write_row(p, {**metrics, **count, **p.scores}, final_params)

    def evaluate(self, step: int, make_scores: Callable[[], Scores]) -> None:
        """Adds scores to the row of the step noted last; they take no time off it.

        Args:
          step: That step; 0, before the first, gets a row of its own.
          make_scores: Returns them by name, the same on every host.
        """
        if self._pending:
            self._wait()
        scores = make_scores()
        mean_ap, rank1 = scores["retrieval_mAP"], scores["retrieval_rank1"]
        self._shown = f"mAP {mean_ap:.3f}  rank-1 {rank1:.3f}  "
        if self._pending:
            self._pending[-1].scores = scores
            self._pending[-1].resumed_at = time.monotonic()
        else:
            self._row_time = time.monotonic()
            if self._writer is not None:
                self._writer.write(step, scores)

    def flush(self) -> None:
        """Brings all rows to storage; call it before a checkpoint newer than they."""
        if self._writer is not None:
            self._writer.flush()

    def write_picture(self, step: int, params: PyTree) -> None:
        """Writes pictures/STEP.png: the same images of the run's first batch each time.

        Args:
          step: Number of updates made.
          params: After them.
        """
        cfg = self._experiment.cfg
        if not self._examples:
            number = min(cfg.log.num_pictures, cfg.train.batch_size)
            self._examples = [self._batches.example(i) for i in range(number)]
        batch = {
            name: np.stack([getattr(e, name) for e in self._examples])
            for name in self._experiment.abstract_batch
        }
        batch = sharding.replicate(batch, self._experiment.mesh)
        predicted = jax.device_get(self._experiment.reconstruct(params, batch))
        if self._writer is not None:
            picture = pictures.reconstructions(
                self._examples, predicted, cfg.encoder.patch_size
            )
            self._writer.write_picture(step, picture)

    def _wait(self) -> None:
        jax.block_until_ready(self._pending[-1].metrics)
        if math.isnan(self._pending[-1].done_at):
            self._pending[-1].done_at = time.monotonic()

    def _is_due(self, step: int) -> bool:
        return step % self._experiment.cfg.log.every_steps == 0 or step in (
            1,
            self._experiment.num_steps,
        )

    def _write_row(
        self,
        p: _Step,
        values: Mapping[str, np.ndarray | int | float],
        final_params: PyTree,
    ) -> None:
        cfg, num_steps = self._experiment.cfg, self._experiment.num_steps
        num_images = (p.step - self._row_step) * cfg.train.batch_size
        images_per_second = num_images / (p.done_at - self._row_time)
        self._row_step, self._row_time = p.step, max(p.done_at, p.resumed_at)
        row = {
            **values,
            "images_per_second": images_per_second,
            "data_seconds": p.data_seconds,
        }
        if p.step == num_steps:
            row["params_sha256"] = params_sha256(final_params)
        if self._writer is not None and self._progress is not None:
            self._warn(p.step, row)
            self._writer.write(p.step, row)
            self._progress.update(
                p.step, float(values["loss"]), images_per_second, self._shown
            )

    def _warn(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Says once that the teacher collapses, and at the end if little was learnt."""
        if metrics.get("teacher_std", 1.0) < _COLLAPSED and not self._has_warned:
            self._has_warned = True
            logging.warning(
                "step %d: teacher_std is %.3f, below %.1f: the teacher says nearly the "
                "same of every image; try a slower teacher or a smaller learning rate",
                step,
                metrics["teacher_std"],
                _COLLAPSED,
            )
        is_last = step == self._experiment.num_steps
        if is_last and metrics.get("feature_explained", 1.0) < _LEARNT:
            logging.warning(
                "feature_explained ends at %.3f, below %.1f: the features are hardly "
                "predicted better than by a constant; train longer",
                metrics["feature_explained"],
                _LEARNT,
            )


def summarise(workdir: epath.Path, num_steps: int) -> str:
    """What a person reads after a finished run: numbers, and where everything is."""
    rows = read_rows(workdir)
    numbers = ""
    for name in _SUMMARISED:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            numbers += f"\n  {name:18}{values[0]:.3f} -> {values[-1]:.3f}"
    return f"""\
Finished {num_steps} steps: first -> last{numbers}
Where everything is:
  pictures          {workdir / "pictures" / f"{num_steps}.png"}
  metrics           {workdir / "metrics.jsonl"}
  TensorBoard       {workdir / "tensorboard"}
  checkpoint        {workdir / "checkpoints" / str(num_steps)}
  the encoder       personmae_jax.load_encoder("{workdir}")
Next, on your own images:
  python launch/pretrain.py --config=configs/vits.py \\
    --config.data.source=folder --config.data.path=IMAGES"""


def check_finite(step: int, metrics: Mapping[str, np.ndarray]) -> None:
    """Raises RunError if a loss or a norm is not finite."""
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise RunError(
                f"step {step}: {name} is {float(value)}; the last checkpoint is from "
                "before it, but the same settings lead here again: start in another "
                "--workdir with a smaller --config.optim.base_lr, with "
                "--config.optim.clip_norm=1 or --config.train.matmul_dtype=float32"
            )


def _sum_over_hosts(counts: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    if jax.process_count() == 1:
        return list(counts)
    values = np.asarray([list(count.values()) for count in counts])
    with jax.transfer_guard("allow"):  # it fetches its result implicitly
        totals = multihost_utils.process_allgather(values).sum(axis=0)
    return [
        dict(zip(count, total, strict=True))
        for count, total in zip(counts, totals.tolist(), strict=True)
    ]
