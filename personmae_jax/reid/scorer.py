"""Retrieval scores of a run while it trains, and which checkpoint they keep."""

import contextlib
import dataclasses
import json
import math
from typing import Any

import jax
from etils import epath

from personmae_jax.engine.metrics import read_rows
from personmae_jax.engine.storage import reporting_failure, write_whole
from personmae_jax.reid.monitor import Monitor

_SCORES = ("mAP", "rank1", "rank5", "rank10", "mINP")


@dataclasses.dataclass(kw_only=True, eq=False)
class Scorer:
    """Scores a state by the queries and the gallery, and writes retrieval.json."""

    monitor: Monitor  # of one network, whose parameters are `params` and `statistics`
    last: int  # step of the run, which is scored
    every: int  # steps from one evaluation to the next
    unit: tuple[str, float]  # what steps are told in, and how many it has
    # Whether the checkpoint of the highest mAP is kept; else the start is scored, too.
    is_selecting: bool = True
    _found: list[dict[str, Any]] = dataclasses.field(default_factory=list, init=False)
    _file: epath.Path | None = dataclasses.field(default=None, init=False)

    @property
    def best_step(self) -> int | None:
        """Of the checkpoint that is kept, 0 before there is any; None: none is."""
        best = self.best
        return (best["step"] if best else 0) if self.is_selecting else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The scores of the highest mAP so far, the first of equals."""
        found = [row for row in self._found if math.isfinite(row["mAP"])]
        return max(found, key=lambda row: row["mAP"], default=None)

    def restore(self, workdir: epath.Path, step: int) -> None:
        """Takes up the scores of an earlier start, up to `step`."""
        self._file = workdir / "retrieval.json"
        self._found = []
        for row in read_rows(workdir) if step else ():
            scores = {name: row.get(f"retrieval_{name}") for name in _SCORES}
            if row["step"] <= step and isinstance(scores["mAP"], float):
                self._found.append({"step": row["step"]} | scores)
        # A row may be lost where storage failed; the best checkpoint must not be.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            best = json.loads(self._file.read_text())["best"] if step else None
            kept = {name: best[name] for name in ("step", *_SCORES)} if best else {}
            if kept and kept["step"] <= step and kept not in self._found:
                self._found = sorted([*self._found, kept], key=lambda row: row["step"])

    def is_due(self, step: int) -> bool:
        """Every so many steps, after the last one, and before the first if asked."""
        if not step:
            return not self.is_selecting
        return step == self.last or step % self.every == 0

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        """Returns the scores as fractions; "occluded" with a block of queries hidden.

        Raises:
          RunError: An image cannot be used, or the disk is full.
        """
        params = {"params": state.params, "statistics": state.statistics}
        ((whole, occluded),) = self.monitor(params)
        values = dataclasses.asdict(whole)
        self._found.append({"step": step} | {name: values[name] for name in _SCORES})
        if self._file is not None and jax.process_index() == 0:
            selected = "best" if self.is_selecting else "last"
            text = {"step": step, **values, "best": self.best, "selected": selected}
            known = {k: None if v != v else v for k, v in text.items()}  # nan
            with reporting_failure(str(self._file)):
                write_whole(self._file, json.dumps(known, indent=2) + "\n")
        scores = {f"retrieval_{name}": values[name] for name in _SCORES}
        return scores | {"occluded_mAP": occluded.mAP}

    def table(self) -> str:
        """The scores of every evaluation, a line each; the highest mAP is marked."""
        unit, length = self.unit
        lines = ["  ".join(f"{name:>7}" for name in ("step", unit, *_SCORES))]
        best = self.best
        mark = "best" if self.is_selecting else "highest, which only test labels tell"
        for row in self._found:
            cells = [f"{row['step']:7}", f"{row['step'] / length:7.1f}"]
            cells += [f"{row[name]:7.3f}" for name in _SCORES]
            lines.append("  ".join([*cells, mark] if row is best else cells))
        return "\n".join(lines)
