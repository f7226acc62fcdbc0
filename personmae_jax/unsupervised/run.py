"""Training without labels as the loop runs it: its data, its scores, what it leaves."""

import shlex

import jax
from etils import epath

from personmae_jax import sharding
from personmae_jax.config_unsupervised import UnsupervisedConfig, check_unsupervised
from personmae_jax.engine import loop
from personmae_jax.engine.storage import open_path
from personmae_jax.engine.training import Training
from personmae_jax.reid.datasets import ReidDataset
from personmae_jax.reid.init import read_encoder
from personmae_jax.reid.monitor import Monitor
from personmae_jax.reid.scorer import Scorer
from personmae_jax.unsupervised import quality
from personmae_jax.unsupervised.data import Unlabelled
from personmae_jax.unsupervised.program import build
from personmae_jax.unsupervised.report import write_report
from personmae_jax.unsupervised.rounds import PseudoLabels


def make_training(
    cfg: UnsupervisedConfig,
    workdir: str,
    target: Unlabelled,
    people: ReidDataset | None,
    scored: ReidDataset | None = None,
    *,
    labels: type[PseudoLabels] = PseudoLabels,
) -> Training:
    """Returns what the loop runs in `workdir`, where it may have begun before.

    Scores by `scored`, else by `people`, steer nothing; without either there are none.
    `people` are those of the target, for `known_` rows. `labels` makes pseudo labels.

    Raises:
      ConfigError: The settings do not fit the devices, or what the encoder starts from.
    """
    check_unsupervised(cfg, jax.device_count())
    start = loop.read_early(workdir, lambda: read_encoder(cfg))
    program = build(cfg, sharding.make_mesh(cfg.mesh), num_images=len(target))
    path, rounds = open_path(workdir), cfg.train.rounds

    def show(round_, clusters, features):
        is_due = round_ % (cfg.eval.every_rounds or rounds) == 0
        is_drawn = is_due or round_ == rounds - 1
        page_name = f"clusters-{round_:04}.png" if is_drawn else None
        write_report(path, target, clusters, features, page_name)
        if people is None:
            return {}
        return quality.known(clusters.labels, people.identities[target.indices])

    batches = labels(cfg, program, target, show)
    scored, scorer = people if scored is None else scored, None
    if scored is not None:
        steps = cfg.train.steps_per_round
        scorer = Scorer(
            monitor=Monitor(batches.extract, scored),
            last=program.num_steps,
            every=cfg.eval.every_rounds * steps,
            unit=("round", float(steps)),
            is_selecting=False,
        )
    return Training(
        program=program,
        data={"num_records": len(target), "images_sha256": target.sha256},
        about=f"{len(target):,} images of {target.num_cameras} cameras without labels, "
        f"{rounds} rounds of {cfg.train.steps_per_round} steps",
        start=start,
        batches=batches,
        summary=lambda path: _summarise(path, program.num_steps, scorer),
        scorer=scorer,
        memory_hint="a smaller --config.eval.batch_size",
    )


def _summarise(workdir: epath.Path, last: int, scorer: Scorer | None) -> str:
    """The scores, if there are any, and where everything is."""
    scores = "No scores: there were no queries, or config.eval.every_rounds is 0."
    if scorer is not None:
        scores = f"{scorer.table()}\nThe last step is the result."
    return f"""\
{scores}
Where everything is:
  clusters          {workdir / "clusters.csv"}
  pages of them     {workdir / "pictures"}
  metrics           {workdir / "metrics.jsonl"}
  checkpoint        {workdir / "checkpoints" / str(last)}
For PyTorch:
  python launch/export_torch.py --workdir={shlex.quote(str(workdir))} \\
    --layout=mae --out=encoder.pth"""
