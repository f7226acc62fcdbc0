"""Retrieval scores of a run while it fine-tunes, and which checkpoint is the best."""

import dataclasses
import json
import math
from typing import Any

import jax
from etils import epath

from personmae_jax.config_finetune import FinetuneConfig
from personmae_jax.engine.metrics import read_rows
from personmae_jax.engine.program import Program
from personmae_jax.engine.storage import write_whole
from personmae_jax.finetune.model import make_encode
from personmae_jax.finetune.sampling import camera_numbers
from personmae_jax.finetune.step import FinetuneState
from personmae_jax.reid.datasets import ReidDataset
from personmae_jax.reid.monitor import Monitor
from personmae_jax.sharding import matmul_dtype

_SCORES = ("mAP", "rank1", "rank5", "rank10", "mINP")


class Scorer:
    """Scores a state by the queries and the gallery, and writes retrieval.json."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        program: Program[FinetuneConfig],
        dataset: ReidDataset,
    ):
        """Compiles nothing yet."""
        self._monitor = Monitor(
            make_encode(cfg, matmul_dtype(cfg.train.matmul_dtype, program.mesh)),
            *(cfg.data, dataset, program.mesh, cfg.eval.batch_size),
            cameras=camera_numbers(dataset),
        )
        self._last = program.num_steps
        self._epoch = len(dataset.train) / cfg.batch_size  # steps
        self._every = max(1, round(cfg.eval.every_epochs * self._epoch))
        self._found: list[dict[str, Any]] = []
        self._file: epath.Path | None = None

    @property
    def best_step(self) -> int:
        """Of the highest mAP so far, the first of equals; 0 before there is any."""
        found = [row for row in self._found if math.isfinite(row["mAP"])]
        return max(found, key=lambda row: row["mAP"], default={"step": 0})["step"]

    def restore(self, workdir: epath.Path, step: int) -> None:
        """Takes up the scores of an earlier start, up to `step`."""
        self._file = workdir / "retrieval.json"
        self._found = []
        for row in read_rows(workdir) if step else ():
            scores = {name: row.get(f"retrieval_{name}") for name in _SCORES}
            if row["step"] <= step and isinstance(scores["mAP"], float):
                self._found.append({"step": row["step"]} | scores)

    def is_due(self, step: int) -> bool:
        """Every config.eval.every_epochs and after the last step."""
        return step > 0 and (step == self._last or step % self._every == 0)

    def __call__(self, step: int, state: FinetuneState) -> dict[str, float]:
        """Returns the scores as fractions; "occluded" with a block of queries hidden.

        Raises:
          RunError: An image cannot be used.
        """
        params = {"params": state.params, "statistics": state.statistics}
        ((whole, occluded),) = self._monitor(params)
        values = dataclasses.asdict(whole)
        self._found.append({"step": step} | {name: values[name] for name in _SCORES})
        if self._file is not None and jax.process_index() == 0:
            best = next((r for r in self._found if r["step"] == self.best_step), None)
            text = {"step": step, **values, "best": best}
            known = {k: None if v != v else v for k, v in text.items()}  # nan
            write_whole(self._file, json.dumps(known, indent=2) + "\n")
        scores = {f"retrieval_{name}": values[name] for name in _SCORES}
        return scores | {"occluded_mAP": occluded.mAP}

    def summarise(self, workdir: epath.Path) -> str:
        """The scores of every evaluation, and where everything is."""
        names = ("step", "epoch", *_SCORES)
        lines = ["  ".join(f"{name:>7}" for name in names)]
        for row in self._found:
            cells = [f"{row['step']:7}", f"{row['step'] / self._epoch:7.1f}"]
            cells += [f"{row[name]:7.3f}" for name in _SCORES]
            mark = "  best" if row["step"] == self.best_step else ""
            lines.append("  ".join(cells) + mark)
        table = "\n".join(lines)
        return f"""\
{table}
Where everything is:
  scores            {workdir / "retrieval.json"}
  curves            {workdir / "pictures" / "curves.png"}
  metrics           {workdir / "metrics.jsonl"}
  checkpoint        {workdir / "checkpoints" / str(self._last)}
  of the best mAP   {workdir / "checkpoints" / str(self.best_step)}
For PyTorch:
  python launch/export_torch.py --workdir={workdir} --layout=transreid \\
    --out=transreid.pth"""
