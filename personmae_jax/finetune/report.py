"""What fine-tuning says of itself: rows, the progress bar, scores, the last table."""

import contextlib
import dataclasses
import json
import math
import time
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from personmae_jax.engine.metrics import MetricsWriter, params_sha256
from personmae_jax.engine.progress import Progress
from personmae_jax.engine.storage import write_whole
from personmae_jax.finetune.step import Finetuning, Metrics
from personmae_jax.pretrain.report import check_finite
from personmae_jax.reid.retrieval import Scores

_SCORES = ("mAP", "rank1", "rank5", "rank10", "mINP")


class FinetuneReport:
    """Keeps metrics on the device until a row is due; a context manager.

    Every process of a run makes the same calls; all read what is in `workdir`, and the
    main one writes.
    """

    def __init__(
        self, finetuning: Finetuning, workdir: epath.Path, start: int, is_main: bool
    ):
        """Opens the files of the run; rows after step `start` are cut off."""
        self._finetuning, self._workdir = finetuning, workdir
        self._pending: list[tuple[int, Any]] = []
        self._extra: dict[str, Any] = {}  # of the step noted last
        self._row_step, self._row_time = start, time.monotonic()
        self._checked_at = self._row_time
        self._evaluated = _read_scores(workdir / "metrics.jsonl", start)
        self._closing = contextlib.ExitStack()
        self._writer = self._progress = None
        if is_main:
            enter = self._closing.enter_context
            self._writer = enter(MetricsWriter(workdir, start))
            self._progress = enter(Progress(finetuning.num_steps, start))

    def __enter__(self) -> "FinetuneReport":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def best_step(self) -> int:
        """Of the highest mAP so far, the first of equals; 0 before there is any."""
        return max(self._evaluated, key=lambda row: row["mAP"], default={"step": 0})[
            "step"
        ]

    def note(self, step: int, metrics: Metrics) -> None:
        """Takes note of a step just dispatched; waits for the one before it.

        Raises:
          RunError: An earlier loss was not finite.
        """
        if self._pending:
            jax.block_until_ready(self._pending[-1][1])
            if self._is_due(step - 1):
                self.write()
        self._pending.append((step, metrics))

    def check(self) -> None:
        """Waits for all steps noted; raises RunError if a number is not finite."""
        steps = [step for step, _ in self._pending]
        fetched = jax.device_get([metrics for _, metrics in self._pending])
        self._pending = list(zip(steps, fetched, strict=True))
        for step, metrics in self._pending:
            check_finite(step, metrics)
        self._checked_at = time.monotonic()

    def add_scores(self, scores: Scores, occluded_map: float) -> None:
        """Adds scores to the row of the step noted last, and writes retrieval.json.

        What they took since `check` is taken off the row's time.

        Args:
          scores: Of whole queries.
          occluded_map: With a block of every query hidden.
        """
        self._row_time += time.monotonic() - self._checked_at
        step = self._pending[-1][0]
        values = dataclasses.asdict(scores)
        self._evaluated.append({"step": step} | {n: values[n] for n in _SCORES})
        self._extra = {f"retrieval_{name}": values[name] for name in _SCORES}
        self._extra["occluded_mAP"] = occluded_map
        if self._writer is not None:
            best = max(self._evaluated, key=lambda row: row["mAP"])
            text = json.dumps({"step": step, **values, "best": best}, indent=2)
            write_whole(self._workdir / "retrieval.json", text + "\n")

    def write(self, final_params: PyTree = None) -> None:
        """Checks every step noted so far and writes the rows that are due.

        Rows are due every `log.every_steps`, at the first and the last step, and where
        there are scores.

        Args:
          final_params: After the last step of the run: its row carries their hash.
        """
        if not self._pending:
            return
        now = time.monotonic()
        self.check()
        if final_params is not None:
            self._extra["params_sha256"] = params_sha256(final_params)
        pending, self._pending = self._pending, []
        for step, metrics in pending:
            extra = self._extra if step == pending[-1][0] else {}
            if self._is_due(step) or extra:
                self._write_row(step, {**metrics, **extra}, now)
        self._extra, self._row_time = {}, time.monotonic()

    def flush(self) -> None:
        """Brings all rows to storage; call it before a checkpoint newer than they."""
        if self._writer is not None:
            self._writer.flush()

    def summarise(self) -> str:
        """The scores of every evaluation, and where everything is."""
        names = ("step", "epoch", *_SCORES)
        lines = ["  ".join(f"{name:>7}" for name in names)]
        cfg, num_images = self._finetuning.cfg, self._finetuning.num_images
        for row in self._evaluated:
            epoch = row["step"] * cfg.batch_size / num_images
            cells = [f"{row['step']:7}", f"{epoch:7.1f}"]
            cells += [f"{row[name]:7.3f}" for name in _SCORES]
            mark = "  best" if row["step"] == self.best_step else ""
            lines.append("  ".join(cells) + mark)
        table, path = "\n".join(lines), self._workdir
        return f"""\
{table}
Where everything is:
  scores            {path / "retrieval.json"}
  metrics           {path / "metrics.jsonl"}
  checkpoint        {path / "checkpoints" / str(self._finetuning.num_steps)}
  of the best mAP   {path / "checkpoints" / str(self.best_step)}
For PyTorch:
  python launch/export_torch.py --workdir={path} --layout=transreid \\
    --out=transreid.pth"""

    def _is_due(self, step: int) -> bool:
        last = self._finetuning.num_steps
        return step % self._finetuning.cfg.log.every_steps == 0 or step in (1, last)

    def _write_row(self, step: int, values: dict[str, Any], now: float) -> None:
        num_images = (step - self._row_step) * self._finetuning.cfg.batch_size
        images_per_second = num_images / max(now - self._row_time, 1e-9)
        self._row_step = step
        if self._writer is not None and self._progress is not None:
            self._writer.write(step, values | {"images_per_second": images_per_second})
            scores = ""
            if self._evaluated:
                last = self._evaluated[-1]
                scores = f"mAP {last['mAP']:.3f}  rank-1 {last['rank1']:.3f}  "
            self._progress.update(
                step, float(values["loss"]), images_per_second, scores
            )


def _read_scores(file: epath.Path, last_step: int) -> list[dict[str, Any]]:
    """The evaluations up to a step, from the rows of an earlier start."""
    found = []
    for line in file.read_text().splitlines() if last_step and file.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
            row = json.loads(line)
            scores = {name: float(row[f"retrieval_{name}"]) for name in _SCORES}
            if row["step"] <= last_step and math.isfinite(scores["mAP"]):
                found.append({"step": int(row["step"])} | scores)
    return found
