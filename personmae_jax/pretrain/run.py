"""Pretraining as the loop runs it: its data, scores, pictures, warnings, summary."""

import functools
import shlex
from collections.abc import Callable, Mapping
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
from personmae_jax.data.records import ListedRecords, Records, TfdsRecords
from personmae_jax.engine import loop
from personmae_jax.engine.metrics import read_rows
from personmae_jax.engine.program import Program
from personmae_jax.engine.training import Start, Training
from personmae_jax.pretrain.program import build, count_steps, make_reconstruct
from personmae_jax.pretrain.reconstructions import reconstructions
from personmae_jax.pretrain.scorer import Scorer, open_people
from personmae_jax.pretrain.train_step import TrainState
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

    Returns:
      The exit code of `loop.run`.

    Raises:
      ConfigError: The settings do not fit the devices, the data, the workdir, the
        folder of config.eval or the file of config.init.
      RunError: The run had to stop. Checkpoints saved before are good.
    """
    num_steps = count_steps(cfg, len(records))
    people = open_people(cfg)
    start = loop.read_early(workdir, lambda: _start(cfg))
    check(cfg, jax.device_count())  # before a mesh is made of them
    program = build(cfg, sharding.make_mesh(cfg.mesh), num_steps)
    scorer = None if people is None else Scorer(cfg, program, people)
    return loop.run(make_training(cfg, program, records, scorer, start), workdir)


def make_training(
    cfg: Config,
    program: Program[Config],
    records: Records,
    scorer: Scorer | None = None,
    start: Callable[[], Start] = lambda: (None, ()),
) -> Training:
    """Puts together what the loop runs, of the program's settings; reads no image."""
    batches = PretrainBatches(
        records, cfg, host=jax.process_index(), num_hosts=jax.process_count()
    )
    facts: dict[str, int | str] = {"num_records": len(records)}
    if isinstance(records, ListedRecords | TfdsRecords):
        facts["records_sha256"] = records.sha256
    bad = BadRecords(records, cfg.data.max_bad_fraction)
    return Training(
        program=program,
        data=facts,
        about=f"{len(records):,} {cfg.data.source} records",
        start=start,
        batches=batches,
        summary=functools.partial(summarise, cfg=cfg, num_steps=program.num_steps),
        scorer=scorer,
        draw=make_draw(cfg, program, batches),
        count_images=lambda batch: bad.count(batch["record"], batch["outcome"]),
        warn=Warnings(program.num_steps),
        keep_initial=True,
        memory_hint="a larger --config.train.accumulate",
    )


def _start(cfg: Config) -> Start:
    if cfg.init.torch_weights is None:
        return None, ()
    return importer.read_encoder(cfg)


def make_draw(
    cfg: Config, program: Program[Config], batches: PretrainBatches
) -> Callable[[int, TrainState], UInt8[np.ndarray, "h w 3"]]:
    """Returns what draws RegionB as the predictor makes it, all hosts alike.

    The images are always those of the run's first batch; none is read yet.
    """
    reconstruct = make_reconstruct(cfg, program)

    @functools.cache
    def read_examples() -> list[Example]:
        number = min(cfg.log.num_pictures, cfg.train.batch_size)
        return [batches.example(i) for i in range(number)]

    def draw(step: int, state: TrainState) -> UInt8[np.ndarray, "h w 3"]:
        del step
        examples = read_examples()
        batch: Batch = {
            name: np.stack([getattr(e, name) for e in examples])
            for name in program.abstract_batch
        }
        on_devices = sharding.replicate(batch, program.mesh)
        predicted = jax.device_get(reconstruct(state.params, on_devices))
        return reconstructions(examples, predicted, cfg.encoder.patch_size)

    return draw


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

    The next commands suit its data and the encoder's size.
    """
    rows, numbers = read_rows(workdir), ""
    config = {768: "vitb", 1024: "vitl"}.get(cfg.encoder.width, "vits")
    height, width = cfg.data.height, cfg.data.width
    size = f" --config.data.height={height} --config.data.width={width}"
    size = "" if (height, width) == (256, 128) else size  # as in the configs
    known = f"market1501.py --config.data.path=Market-1501{size}"
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
    --workdir={shlex.quote(f"{workdir}_finetuned")} \\
    --config.init.workdir={shlex.quote(str(workdir))}
Next, on your own images:
  python launch/pretrain.py --config=configs/{config}.py \\
    --config.data.source=folder --config.data.path=IMAGES{size}"""
