"""Pretraining as the loop runs it: its data, scores, pictures, warnings, summary."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from personmae_jax import sharding
from personmae_jax.config import Config
from personmae_jax.config_check import check
from personmae_jax.data.bad_records import BadRecords
from personmae_jax.data.batches import Batch
from personmae_jax.data.pipeline import Example, PretrainBatches
from personmae_jax.data.records import Records
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import has_checkpoint
from personmae_jax.engine.metrics import read_rows
from personmae_jax.engine.program import Program
from personmae_jax.engine.training import Start, Training
from personmae_jax.pretrain.program import build, count_steps, make_reconstruct
from personmae_jax.pretrain.reconstructions import reconstructions
from personmae_jax.pretrain.scorer import Scorer, open_people
from personmae_jax.pretrain.state import TrainState
from personmae_jax.pytorch import importer

_COLLAPSED = 0.1  # a teacher_std below it is said; ours
_LEARNT = 0.2  # a last feature_explained below it is said; ours
_SUMMARISED = (
    *("pixel_loss", "feature_loss", "feature_explained", "teacher_std"),
    # The first are of the untrained network.
    *("retrieval_mAP", "retrieval_rank1", "occluded_mAP"),
)


def run(cfg: Config, workdir: str, records: Records) -> int:
    """Pretrains to the last step or until interrupted; resumes what `workdir` holds.

    Args:
      cfg: The settings, checked.
      workdir: A local folder or gs://...
      records: The encoded images.

    Returns:
      The exit code of `loop.run`.

    Raises:
      ConfigError: The settings do not fit the devices, the data, the workdir, the
        folder of config.eval or the file of config.init.
      RunError: The run had to stop. Checkpoints saved before are good.
    """
    num_steps = count_steps(cfg, len(records))
    people, start = open_people(cfg), functools.cache(lambda: _start(cfg))
    if not has_checkpoint(workdir):
        start()  # before any device work: a file that does not fit is told at once
    check(cfg, jax.device_count())  # before a mesh is made of them
    program = build(cfg, sharding.make_mesh(cfg.mesh), num_steps)
    scorer = None if people is None else Scorer(cfg, program, people)
    return loop.run(make_training(cfg, program, records, scorer, start), workdir)


def make_training(
    cfg: Config,
    program: Program[Config],
    records: Records,
    scorer: Scorer | None = None,
    start=lambda: (None, ()),
) -> Training:
    """Puts together what the loop runs; reads no image yet.

    Args:
      cfg: The settings of the program.
      program: What is computed.
      records: The encoded images.
      scorer: Scores the networks while they train.
      start: Reads what the encoder starts from, as `Training` takes it.
    """
    batches = PretrainBatches(
        records, cfg, host=jax.process_index(), num_hosts=jax.process_count()
    )
    bad = BadRecords(records, cfg.data.max_bad_fraction)
    return Training(
        program=program,
        data={"num_records": len(records)},
        about=f"{len(records):,} {cfg.data.source} records",
        start=start,
        batches=batches,
        summary=functools.partial(summarise, cfg=cfg, num_steps=program.num_steps),
        scorer=scorer,
        draw=Reconstructions(cfg, program, batches),
        count_images=lambda batch: bad.count(batch["record"], batch["outcome"]),
        warn=Warnings(program.num_steps),
        keep_initial=True,
        memory_hint="a larger --config.train.accumulate",
    )


def _start(cfg: Config) -> Start:
    if cfg.init.torch_weights is None:
        return None, ()
    return importer.read_encoder(cfg)


class Reconstructions:
    """Draws what the predictor makes of RegionB, of the same images each time."""

    def __init__(self, cfg: Config, program: Program[Config], batches: PretrainBatches):
        """Reads nothing yet; the images will be those of the run's first batch."""
        self._cfg, self._program, self._batches = cfg, program, batches
        self._examples: list[Example] = []
        self._reconstruct = make_reconstruct(cfg, program)

    def __call__(self, step: int, state: TrainState) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the picture of the state after `step`; all hosts call it alike."""
        del step
        cfg, program = self._cfg, self._program
        if not self._examples:
            number = min(cfg.log.num_pictures, cfg.train.batch_size)
            self._examples = [self._batches.example(i) for i in range(number)]
        batch: Batch = {
            name: np.stack([getattr(e, name) for e in self._examples])
            for name in program.abstract_batch
        }
        on_devices = sharding.replicate(batch, program.mesh)
        predicted = jax.device_get(self._reconstruct(state.params, on_devices))
        return reconstructions(self._examples, predicted, cfg.encoder.patch_size)


class Warnings:
    """Says once that the teacher collapses, and at the end if little was learnt."""

    def __init__(self, num_steps: int):
        self._num_steps, self._has_warned = num_steps, False

    def __call__(self, step: int, row: Mapping[str, Any]) -> None:
        """Looks at the row of a step."""
        if row.get("teacher_std", 1.0) < _COLLAPSED and not self._has_warned:
            self._has_warned = True
            logging.warning(
                "step %d: teacher_std is %.3f, below %.1f: the teacher says nearly the "
                "same of every image; try a slower teacher or a smaller learning rate",
                *(step, row["teacher_std"], _COLLAPSED),
            )
        is_last = step == self._num_steps
        if is_last and row.get("feature_explained", 1.0) < _LEARNT:
            logging.warning(
                "feature_explained ends at %.3f, below %.1f: the features are hardly "
                "predicted better than by a constant; train longer",
                *(row["feature_explained"], _LEARNT),
            )


def summarise(workdir: epath.Path, cfg: Config, num_steps: int) -> str:
    """What a person reads after a finished run: numbers, and where everything is.

    Args:
      workdir: Of the run.
      cfg: Its settings: the next commands suit its data and the encoder's size.
      num_steps: Its length.
    """
    rows, numbers = read_rows(workdir), ""
    config = {768: "vitb", 1024: "vitl"}.get(cfg.encoder.width, "vits")
    known = "market1501.py --config.data.path=Market-1501"
    if cfg.data.source == "synthetic":
        known = "quickstart.py"
    for name in _SUMMARISED:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            numbers += f"\n  {name:18}{values[0]:.3f} -> {values[-1]:.3f}"
    return f"""\
Finished {num_steps} steps: first -> last{numbers}
Where everything is:
  pictures          {workdir / "pictures" / f"{num_steps}.png"}
  curves            {workdir / "pictures" / "curves.png"}
  metrics           {workdir / "metrics.jsonl"}
  TensorBoard       {workdir / "tensorboard"}
  checkpoint        {workdir / "checkpoints" / str(num_steps)}
  the encoder       personmae_jax.load_encoder("{workdir}")
Next, fine-tuned on known people (without the third line: from scratch, the control):
  python launch/finetune.py --config=configs/finetune_{known} \\
    --workdir={workdir}_finetuned \\
    --config.init.workdir={workdir}
Next, on your own images:
  python launch/pretrain.py --config=configs/{config}.py \\
    --config.data.source=folder --config.data.path=IMAGES"""
