"""Measures USL and UDA beside their control: the same with shuffled pseudo labels.

Example: python benchmarks/unsupervised.py --init=runs/quickstart --out=runs/usl_bench

Augmentation and batch norm alone move mAP as much as pseudo labels may, so a gain over
the start proves nothing: the control shuffles the labels among the clustered images of
every round, and is otherwise the same run. Tasks: `usl`, synthetic people, six cameras
(configs/usl_quickstart.py); `uda`, other people in cameras 3 to 5, from a run that was
fine-tuned on synthetic people in cameras 0 to 2; with --people=DIR, in the layout
id_folders, `people` and `people_proxies`: USL on them without and with camera proxies,
and `uda_people`: UDA to them from that same run.

Writes OUT/results.json after every run, skips those that are in it, and prints a table:
mean and standard deviation over seeds, mAP in percent at the start and at the end.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import finetune_quickstart, usl_quickstart  # noqa: E402
from personmae_jax.config_unsupervised import UnsupervisedConfig  # noqa: E402
from personmae_jax.engine import distributed, loop  # noqa: E402
from personmae_jax.engine.metrics import read_rows  # noqa: E402
from personmae_jax.engine.storage import open_path  # noqa: E402
from personmae_jax.finetune import run as finetune  # noqa: E402
from personmae_jax.finetune.sampling import open_training  # noqa: E402
from personmae_jax.reid import init  # noqa: E402
from personmae_jax.reid.datasets import ReidDataset  # noqa: E402
from personmae_jax.unsupervised.clustering import OUTLIER  # noqa: E402
from personmae_jax.unsupervised.data import Unlabelled, open_target, unlabelled  # noqa: E402
from personmae_jax.unsupervised.rounds import PseudoLabels  # noqa: E402
from personmae_jax.unsupervised.run import make_training  # noqa: E402

_INIT = flags.DEFINE_string("init", None, "A pretraining run.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)
_PEOPLE = flags.DEFINE_string("people", None, "A data set in the layout id_folders.")
_TASKS = flags.DEFINE_list(
    "tasks", ["usl", "uda", "people", "people_proxies", "uda_people"], "Some."
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each kind.")
_ROUNDS = flags.DEFINE_integer("rounds", None, "Of each run; the config's if absent.")


class ShuffledLabels(PseudoLabels):
    """The control: as many clusters, of as many images each, of anybody."""

    def make_labels(self, round_, features):
        labels, numbers = super().make_labels(round_, features)
        rng = np.random.default_rng((self._cfg.train.seed, round_))
        is_clustered = labels != OUTLIER
        labels = labels.copy()
        labels[is_clustered] = rng.permutation(labels[is_clustered])
        return labels, numbers


def main(_: list[str]) -> None:
    distributed.initialize()
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    tasks = [t for t in _TASKS.value if _PEOPLE.value or "people" not in t]
    for seed in range(_SEEDS.value):
        for task in tasks:
            for kind in (PseudoLabels, ShuffledLabels):
                name = f"{task}/{kind.__name__}/{seed}"
                if name not in results:
                    results[name] = measure(task, kind, seed, out / name)
                    file.write_text(json.dumps(results, indent=1))
                    print(table(results, tasks), flush=True)


def measure(
    task: str, kind: type[PseudoLabels], seed: int, workdir: pathlib.Path
) -> dict[str, float]:
    """The first and the last scores of one run, and how good its labels were."""
    cfg = settings(task, seed)
    is_uda = task.startswith("uda")
    cfg.init.workdir = str(source_run(workdir)) if is_uda else _INIT.value
    init.settle(cfg, str(workdir))
    target, people = open_target(cfg)
    if task == "uda":
        target, people = in_other_cameras(people)
    training = make_training(cfg, str(workdir), target, people, labels=kind)
    loop.run(training, str(workdir))
    rows = read_rows(open_path(workdir))
    scored = [row["retrieval_mAP"] for row in rows if "retrieval_mAP" in row]
    rounds = [row for row in rows if "clusters" in row]
    return {
        "start": scored[0],
        "end": scored[-1],
        "first_ari": rounds[0]["known_ari"],
        "last_ari": rounds[-1]["known_ari"],
        "first_clusters": rounds[0]["clusters"],
        "last_clusters": rounds[-1]["clusters"],
        "across_cameras": rounds[-1]["clusters_across_cameras"],
    }


def settings(task: str, seed: int) -> UnsupervisedConfig:
    cfg = usl_quickstart.get_config()
    cfg.train.seed = seed
    cfg.checkpoint.every_steps = 10**6
    if _ROUNDS.value is not None:
        cfg.train.rounds = _ROUNDS.value
    if task == "uda":
        cfg.data.synthetic.first_identity = 2000  # the source's are 1000 to 1299
    if task.startswith("uda"):
        cfg.optim.base_lr = 1e-3  # gentler than USL: the encoder was fine-tuned
    if "people" in task:
        cfg.data.layout, cfg.data.path = "id_folders", _PEOPLE.value
        cfg.memory.camera_proxies = task == "people_proxies"
    return cfg


def source_run(workdir: pathlib.Path) -> pathlib.Path:
    """Fine-tunes on synthetic people in cameras 0 to 2, once."""
    folder = workdir.parents[2] / "source"
    cfg = finetune_quickstart.get_config()
    cfg.init.workdir = _INIT.value
    init.settle(cfg, str(folder))
    finetune.run(cfg, str(folder), open_training(cfg))
    return folder


def in_other_cameras(people: ReidDataset | None) -> tuple[Unlabelled, ReidDataset]:
    """The part of a data set of six cameras that the last three saw."""
    assert people is not None
    seen = np.flatnonzero(people.cameras >= 3)
    parts = {
        name: np.intersect1d(getattr(people, name), seen)
        for name in ("query", "gallery", "train")
    }
    people = dataclasses.replace(people, **parts)
    cameras = people.cameras[people.train]
    return unlabelled(people.records, people.train, cameras), people


def table(results: dict[str, dict[str, float]], tasks: list[str]) -> str:
    """Mean and deviation over the seeds that there are, in percent."""
    lines = [f"{'':30} {'start':>12} {'end':>12} {'gain':>12} {'ARI':>14}  seeds"]
    for task in tasks:
        for kind in ("PseudoLabels", "ShuffledLabels"):
            found = [v for k, v in results.items() if k.startswith(f"{task}/{kind}/")]
            if found:
                columns = {
                    name: 100 * np.array([row[name] for row in found])
                    for name in ("start", "end")
                }
                columns["gain"] = columns["end"] - columns["start"]
                cells = [f"{v.mean():5.1f} +- {v.std():3.1f}" for v in columns.values()]
                aris = [
                    np.mean([r[n] for r in found]) for n in ("first_ari", "last_ari")
                ]
                cells.append(f"{aris[0]:.3f} -> {aris[1]:.3f}")
                lines.append(f"{task + ' ' + kind:30} {' '.join(cells)}  {len(found)}")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
