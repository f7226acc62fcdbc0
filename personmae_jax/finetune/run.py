"""Fine-tuning as the loop runs it: its data, its scores, what it leaves."""

import shlex

import jax
import numpy as np
from etils import epath

from personmae_jax import sharding
from personmae_jax.config_finetune import FinetuneConfig, check_finetuning
from personmae_jax.engine import loop
from personmae_jax.engine.training import Training
from personmae_jax.finetune import sampling
from personmae_jax.finetune.model import make_encode
from personmae_jax.finetune.program import build
from personmae_jax.reid.datasets import ReidDataset, labels_sha256
from personmae_jax.reid.features import Extractor
from personmae_jax.reid.init import read_encoder
from personmae_jax.reid.monitor import Monitor
from personmae_jax.reid.scorer import Scorer
from personmae_jax.sharding import matmul_dtype


def run(
    cfg: FinetuneConfig,
    workdir: str,
    dataset: ReidDataset,
    scored: ReidDataset | None = None,
) -> int:
    """Fine-tunes to the last step or until interrupted; resumes what `workdir` holds.

    Queries and gallery are those of `scored`, else of `dataset`.

    Returns:
      The exit code of `loop.run`.

    Raises:
      ConfigError: The settings do not fit the devices, the workdir or what the encoder
        starts from.
      RunError: The run had to stop. Checkpoints saved before are good.
    """
    check_finetuning(cfg, jax.device_count())
    start = loop.read_early(workdir, lambda: read_encoder(cfg))
    facts: dict[str, int | str] = {"labels_sha256": labels_sha256(dataset)}
    if scored is not None:
        facts |= {
            "num_queries": len(scored.query),
            "scored_sha256": labels_sha256(scored),
        }
    scored = dataset if scored is None else scored
    num_images, people = len(dataset.train), sampling.num_identities(dataset)
    program = build(
        *(cfg, sharding.make_mesh(cfg.mesh)),
        num_images=num_images,
        num_identities=people,
        num_cameras=len(np.unique(dataset.cameras)),
    )
    epoch = num_images / cfg.batch_size  # steps
    scorer = Scorer(
        monitor=Monitor(
            Extractor(
                make_encode(cfg, matmul_dtype(cfg.train.matmul_dtype, program.mesh)),
                *(cfg.data, program.mesh, cfg.eval.batch_size),
            ),
            scored,
            cameras=sampling.camera_numbers(scored),
        ),
        last=program.num_steps,
        every=max(1, round(cfg.eval.every_epochs * epoch)),
        unit=("epoch", epoch),
    )
    training = Training(
        program=program,
        data={"num_records": num_images, "num_identities": people} | facts,
        about=f"{num_images:,} images of {people:,} people, {len(scored.query):,} "
        f"queries in {len(scored.gallery):,} of {scored.where}",
        start=start,
        batches=sampling.FinetuneBatches(
            dataset, cfg, host=jax.process_index(), num_hosts=jax.process_count()
        ),
        summary=lambda path: _summarise(path, program.num_steps, scorer),
        scorer=scorer,
        memory_hint="a smaller --config.eval.batch_size",
    )
    return loop.run(training, workdir)


def _summarise(workdir: epath.Path, last: int, scorer: Scorer) -> str:
    """The scores of every evaluation, and where everything is."""
    return f"""\
{scorer.table()}
Where everything is:
  scores            {workdir / "retrieval.json"}
  curves            {workdir / "pictures" / "curves.png"}
  metrics           {workdir / "metrics.jsonl"}
  checkpoint        {workdir / "checkpoints" / str(last)}
  of the best mAP   {workdir / "checkpoints" / str(scorer.best_step)}
For PyTorch:
  python launch/export_torch.py --workdir={shlex.quote(str(workdir))} \\
    --layout=transreid --out=transreid.pth"""
