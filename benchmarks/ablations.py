"""Does pretraining help to re-identify people, and which part of the method does?

Pretrains a small ViT without labels, once for every variant of the method, then
fine-tunes each on known people with the same recipe and the same number of steps, and
one more from random weights; for several seeds. Prints two tables in markdown:

  frozen      mAP of the pretrained features, on whole and on occluded queries
  fine-tuned  mAP and rank-1 after fine-tuning, and mAP on occluded queries

each as mean (least to most) over the seeds, in percent. The people sought are in no
training batch of the fine-tuning.

Run: python benchmarks/ablations.py --out=runs/ablations
     python benchmarks/ablations.py --out=runs/ablations_real --people=DIR --crops=DIR
Without folders people are drawn. --crops holds images to pretrain on, without labels;
--people holds train/ and val/, each with a folder for every person with images named
CAMERA_... . What is finished is not run again, and what was cut off is resumed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_SCRATCH = "from scratch"
_VARIANTS = {
    "PersonMAE": [],
    "RegionB = RegionA": ["--config.regions.same=True"],
    "random masks": ["--config.masks.kind=random"],
    "pixels only": ["--config.loss.feature_weight=0"],
    "features only": ["--config.loss.pixel_weight=0"],
    _SCRATCH: None,
}
_SCORES = ("retrieval_mAP", "retrieval_rank1", "occluded_mAP")

Scores = dict[str, float]


def main() -> None:
    args = read_arguments()
    frozen: dict[str, list[Scores]] = {}
    tuned: dict[str, list[Scores]] = {}
    for seed in range(args.seeds):
        for variant in args.variants:
            settings = _VARIANTS[variant]
            name = f"{variant.replace(' ', '_')}-{seed}"
            init = []
            if settings is not None:
                run = args.out / "pretrained" / name
                pretrain(args, run, seed, settings)
                for when, row in zip(("untrained", variant), ends(run), strict=True):
                    if when == variant or variant == args.variants[0]:
                        frozen.setdefault(when, []).append(row)
                init = [f"--config.init.workdir={run}"]
            run = args.out / "finetuned" / name
            finetune(args, run, seed, init)
            tuned.setdefault(variant, []).append(ends(run)[1])
    print(table("frozen", frozen), table("fine-tuned", tuned), sep="\n\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="of all the runs")
    parser.add_argument("--people", help="folder of known people; needs --crops")
    parser.add_argument("--crops", help="folder of images to pretrain on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--variants", nargs="+", choices=_VARIANTS, default=list(_VARIANTS)
    )
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument(
        "--finetune-steps",
        type=int,
        help="200 if absent; 800 for drawn people, whom 200 do not tell apart",
    )
    args = parser.parse_args()
    if (args.people is None) != (args.crops is None):
        parser.error("--people and --crops go together")
    if args.finetune_steps is None:
        args.finetune_steps = 800 if args.people is None else 200
    return args


def pretrain(
    args: argparse.Namespace, run: Path, seed: int, settings: list[str]
) -> None:
    words = [
        f"--config.train.seed={seed}",
        f"--config.train.steps={args.pretrain_steps}",
        f"--config.eval.every_steps={args.pretrain_steps}",
        f"--config.checkpoint.every_steps={args.pretrain_steps}",
        # Unlike the quickstart's: the default loss, and larger batches, from which
        # features learn more in the same time.
        "--config.loss.feature_weight=1",
        "--config.train.batch_size=128",
        "--config.optim.base_lr=3e-3",
        "--config.eval.feature=mean",
        "--config.log.every_steps=50",
    ]
    if args.people is not None:
        words += [
            "--config.data.source=folder",
            f"--config.data.path={args.crops}",
            f"--config.eval.path={args.people}",
            "--config.eval.layout=id_folders",
            "--config.eval.centre_cameras=False",
        ]
    launch("pretrain.py", "quickstart.py", run, words + settings)


def finetune(args: argparse.Namespace, run: Path, seed: int, init: list[str]) -> None:
    words = [
        f"--config.train.seed={seed}",
        f"--config.train.steps={args.finetune_steps}",
        "--config.log.every_steps=50",
    ]
    if args.people is not None:
        words += [
            "--config.data.layout=id_folders",
            f"--config.data.path={args.people}",
        ]
    launch("finetune.py", "finetune_quickstart.py", run, words + init)


def launch(launcher: str, config: str, run: Path, words: list[str]) -> None:
    """Runs to the end, or goes on where it was cut off."""
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, f"launch/{launcher}", f"--config=configs/{config}"]
    command += [f"--workdir={run.absolute()}", *words]
    if (run / "finished").exists():
        return
    print("+", *command[1:], file=sys.stderr, flush=True)
    with open(f"{run}.log", "a") as log:
        code = subprocess.run(command, cwd=_ROOT, stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"error: it left with exit code {code}; see {run}.log")
    (run / "finished").touch()


def ends(run: Path) -> tuple[Scores, Scores]:
    """The first and the last scores of a run."""
    with open(run / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if _SCORES[0] in row]
    return rows[0], rows[-1]


def table(title: str, scores: dict[str, list[Scores]]) -> str:
    lines = [f"| {title} | mAP | rank-1 | mAP, occluded |", "| --- " * 4 + "|"]
    for name, rows in scores.items():
        cells = [spread([100 * row[score] for row in rows]) for score in _SCORES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
