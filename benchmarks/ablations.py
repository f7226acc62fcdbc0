"""Does PersonMAE beat plain MAE, and which of its parts pay?

Pretrains a small ViT without labels, once for every variant of the method and seed,
and seeks people whom it has never seen by the frozen cls and mean tokens. Then
fine-tunes each, and as often random weights, on known people: cross-validated, so that
everybody is once among those who are sought. All variants have the same images, steps,
batches and network, and choose their learning rate from the same list on a seed of its
own. The queries are one camera's images and the gallery the other cameras', both ways
round; "occluded" hides a part of every query.

Run: python benchmarks/ablations.py --out=runs/ablations
     python benchmarks/ablations.py --out=runs/real --people=DIR --crops=DIR [DIR...]

Without folders people are drawn. --people holds a folder for each person, itself or in
train/ and val/, with images named CAMERA_...; --crops are images to pretrain on,
without labels, of nobody in --people. What is finished is not run again, and what was
cut off is resumed: results.jsonl has a line for every score, table.md the tables, as
mean and standard error over seeds, in percent.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_SCRATCH = "from scratch"
_SEARCH_SEED = 1000

_BEFORE = [
    "--config.regions.min_area=0.5",
    "--config.regions.nested=0",
    "--config.loss.cls_weight=0",
    "--config.loss.feature_blocks=1",
    "--config.loss.feature_instance_norm=False",
    "--config.loss.visible_pixel_weight=1",
    "--config.masks.ratio=0.5",
    "--config.masks.block_share=1",
    "--config.pixel_predictor.use_self_attention=True",
    "--config.pixel_predictor.memory_blocks=(0,-1)",
    "--config.feature_predictor.use_self_attention=True",
    "--config.feature_predictor.memory_blocks=(-1,)",
]
_NESTED = ["--config.regions.min_area=0.8", "--config.regions.nested=1"]
_CLS = ["--config.loss.cls_weight=0.02"]
_CROSS = [
    f"--config.{predictor}_predictor.{setting}"
    for predictor in ("pixel", "feature")
    for setting in ("use_self_attention=False", "memory_blocks=(1,-1)")
]
_TARGET = [
    "--config.loss.feature_blocks=2",
    "--config.loss.feature_instance_norm=True",
]
_NOW = [*_BEFORE, *_NESTED, *_CLS, *_CROSS, *_TARGET]
_VARIANTS = {
    "plain MAE": [
        *_BEFORE,
        "--config.regions.same=True",
        "--config.masks.kind=random",
        "--config.masks.ratio=0.75",
        "--config.loss.feature_weight=0",
        "--config.loss.visible_pixel_weight=0",
    ],
    "PersonMAE before": _BEFORE,
    "PersonMAE": _NOW,
    "one region": [*_NOW, "--config.regions.same=True"],
    "random masks": [*_NOW, "--config.masks.kind=random"],
    "no features": [*_NOW, "--config.loss.feature_weight=0"],
    "no pixels": [*_NOW, "--config.loss.pixel_weight=0"],
    "no cls loss": [*_NOW, "--config.loss.cls_weight=0"],
    "independent regions": [*_BEFORE, *_CLS, *_CROSS, *_TARGET],
    "self-attention": [*_BEFORE, *_NESTED, *_CLS, *_TARGET],
    "last block as target": [*_BEFORE, *_NESTED, *_CLS, *_CROSS],
    _SCRATCH: None,
}
_NETWORK = [
    "--config.encoder.width=96",
    "--config.encoder.depth=4",
    "--config.encoder.num_heads=3",
    "--config.encoder.patch_size=8",
    "--config.data.height=64",
    "--config.data.width=32",
]

Row = dict[str, Any]  # a line of results.jsonl


class Bench:
    """The runs of one folder and their scores."""

    def __init__(self, args: argparse.Namespace, crops: Path, people: list[Path]):
        """Cuts the people into folds; what is left over is always trained on."""
        self._args, self._crops = args, crops
        self._all = args.out.absolute() / "people" / "all"
        link(self._all, people)
        size = len(people) // args.folds
        self._folds = [
            args.out.absolute() / "people" / f"{k}" for k in range(args.folds)
        ]
        for k, folder in enumerate(self._folds):
            test = people[k :: args.folds][:size]
            link(folder / "val", test)
            link(folder / "train", [p for p in people if p not in test])
        self._results = args.out / "results.jsonl"
        self._check_lengths()

    def _check_lengths(self) -> None:
        """A folder holds runs of one length: no name in it tells another."""
        names = ("folds", "steps", "batch", "finetune_steps")
        ours = {name: getattr(self._args, name) for name in names}
        path = self._args.out / "lengths.json"
        if not path.exists():
            path.write_text(json.dumps(ours))
        if (theirs := json.loads(path.read_text())) != ours:
            sys.exit(
                f"error: {self._args.out} has runs of {theirs}; choose another --out"
            )

    def run(self) -> None:
        """Everything that is missing, one seed after the other."""
        for variant in self._args.variants:
            self.rate(variant)
        for seed in range(self._args.seeds):
            for variant in self._args.variants:
                self.score_variant(variant, seed, self.rate(variant))
                write_tables(self._args, self.at_chosen_rates())

    def at_chosen_rates(self) -> list[Row]:
        """The rows of the table: a folder may hold those of other rates as well."""
        rates = {name: self.rate(name) for name in self._args.variants}
        rates["untrained"] = rates[self._args.variants[0]]
        return [r for r in self.rows() if r["rate"] == rates.get(r["variant"])]

    def rate(self, variant: str) -> float:
        """The peak learning rate with the best fine-tuned mAP on a seed of its own."""
        rates = self._args.rates
        if len(rates) == 1 or variant == _SCRATCH:
            return rates[0]
        found = {}
        for rate in rates:
            run = self.pretrain(variant, _SEARCH_SEED, rate)
            scores = [
                self.finetuned(variant, _SEARCH_SEED, rate, run, fold)["mAP"]
                for fold in range(min(2, len(self._folds)))
            ]
            found[statistics.mean(scores)] = rate
        return found[max(found)]

    def score_variant(self, variant: str, seed: int, rate: float) -> None:
        run = None
        if variant != _SCRATCH:
            run = self.pretrain(variant, seed, rate)
            ends = {variant: self._args.steps}
            if variant == self._args.variants[0]:
                ends["untrained"] = 0
            for name, step in ends.items():
                for feature in ("cls", "mean"):
                    key = {"kind": f"frozen, {feature}", "variant": name, "seed": seed}
                    self.once(key | {"rate": rate}, run, step, self._all, feature)
        for fold in range(len(self._folds)):
            self.finetuned(variant, seed, rate, run, fold)

    def pretrain(self, variant: str, seed: int, rate: float) -> Path:
        steps = self._args.steps
        words = [
            *_NETWORK,
            "--config.pixel_predictor.depth=1",
            "--config.feature_predictor.depth=1",
            "--config.data.source=folder",
            f"--config.data.path={self._crops}",
            f"--config.train.seed={seed}",
            f"--config.train.steps={steps}",
            f"--config.train.batch_size={self._args.batch}",
            f"--config.checkpoint.every_steps={steps}",
            f"--config.log.pictures_every_steps={steps}",
            "--config.log.every_steps=25",
            "--config.eval.every_steps=0",
            "--config.optim.clip_norm=1",
            f"--config.optim.lr={rate}",
            "--config.loss.feature_weight=1",
            *_VARIANTS[variant],
        ]
        name = f"{variant.replace(' ', '_')}-{seed}-{rate:g}"
        run = self._args.out.absolute() / "pretrained" / name
        launch("pretrain.py", "quickstart.py", run, words)
        return run

    def finetuned(
        self, variant: str, seed: int, rate: float, init: Path | None, fold: int
    ) -> Row:
        key = {"kind": "fine-tuned", "variant": variant, "seed": seed, "rate": rate}
        key["fold"] = fold
        if found := self.find(key):
            return found
        words = [
            *_NETWORK,
            f"--config.train.seed={seed}",
            f"--config.train.steps={self._args.finetune_steps}",
            "--config.log.every_steps=25",
            "--config.eval.every_epochs=1000",
            "--config.augment.padding=3",
            "--config.data.layout=id_folders",
            f"--config.data.path={self._folds[fold]}",
        ]
        words += [f"--config.init.workdir={init}"] if init else []
        name = f"{variant.replace(' ', '_')}-{seed}-{rate:g}-{fold}"
        run = self._args.out.absolute() / "finetuned" / name
        launch("finetune.py", "finetune_quickstart.py", run, words)
        return self.once(key, run, None, self._folds[fold], "cls")

    def once(self, key: Row, run: Path, step: int | None, people: Path, feature: str):
        """Scores unless it is known already."""
        row = self.find(key)
        if row is None:
            row = key | score(run, step, people, feature)
            with open(self._results, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def find(self, key: Row) -> Row | None:
        return next((r for r in self.rows() if key.items() <= r.items()), None)

    def rows(self) -> list[Row]:
        if not self._results.exists():
            return []
        return [json.loads(line) for line in self._results.read_text().splitlines()]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="of all the runs")
    parser.add_argument("--people", type=Path, help="known people; needs --crops")
    parser.add_argument("--crops", type=Path, nargs="+", help="images without labels")
    parser.add_argument(
        "--variants", nargs="+", choices=_VARIANTS, default=[*_VARIANTS]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining")
    parser.add_argument("--batch", type=int, default=128, help="of pretraining")
    parser.add_argument("--finetune-steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    args = parser.parse_args()
    if (args.people is None) != (args.crops is None):
        parser.error("--people and --crops go together")
    return args


def link(folder: Path, targets: list[Path]) -> None:
    """Makes a folder of symbolic links to others, under their own names."""
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets:
        if not (folder / target.name).is_symlink():
            (folder / target.name).symlink_to(target.resolve())


def people_of(root: Path) -> list[Path]:
    parts = [root / "train", root / "val"]
    parts = parts if all(p.is_dir() for p in parts) else [root]
    return sorted(p for part in parts for p in part.iterdir() if p.is_dir())


def draw(out: Path) -> tuple[Path, list[Path]]:
    """Draws 500 people to pretrain on, and 75 others in two cameras, eight times each.

    Returns:
      Folder of crops; a folder for each of the others.
    """
    from personmae_jax.config import SyntheticConfig
    from personmae_jax.data.records import SyntheticRecords

    crops, known = out / "drawn" / "crops", out / "drawn" / "people"
    if not (out / "drawn" / "complete").exists():
        crops.mkdir(parents=True, exist_ok=True)
        for i, image in images_of(SyntheticRecords(SyntheticConfig(identities=500))):
            (crops / f"{i}.jpg").write_bytes(image)
        settings = SyntheticConfig(
            identities=75, first_identity=1000, cameras=2, shots=8
        )
        for i, image in images_of(SyntheticRecords(settings)):
            person, camera, shot = i // 16, i // 8 % 2, i % 8
            (known / f"{person:03}").mkdir(parents=True, exist_ok=True)
            path = known / f"{person:03}" / f"{camera + 1:02}_{shot}.jpg"
            path.write_bytes(image)
        (out / "drawn" / "complete").touch()
    return crops, people_of(known)


def images_of(records: Any) -> Iterator[tuple[int, bytes]]:
    return ((i, records.read(i)) for i in range(len(records)))


def launch(launcher: str, config: str, run: Path, words: list[str]) -> None:
    """Runs to the end, or goes on where it was cut off."""
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, f"launch/{launcher}", f"--config=configs/{config}"]
    command += [f"--workdir={run}", *words]
    if Path(f"{run}.finished").exists():
        return
    print("+", *command[1:], file=sys.stderr, flush=True)
    with open(f"{run}.log", "a") as log:
        code = subprocess.run(command, cwd=_ROOT, stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"error: it left with exit code {code}; see {run}.log")
    Path(f"{run}.finished").touch()


@functools.cache
def extractor(feature: str, settings: str) -> Any:
    """One for every network, so that it is compiled once."""
    from personmae_jax import sharding
    from personmae_jax.config_json import config_from_json
    from personmae_jax.reid.features import Extractor, make_encode

    cfg = config_from_json(settings)
    encode = make_encode(cfg.encoder, cfg.data, feature)
    return Extractor(encode, cfg.data, sharding.make_mesh(), 256)


def score(run: Path, step: int | None, people: Path, feature: str) -> Row:
    """Returns mAP and rank-1 of whole queries and mAP of occluded ones, as fractions.

    Each is the mean of both directions: every camera's images once as the queries.
    """
    from personmae_jax.engine.checkpoint import describe, restore_encoder
    from personmae_jax.reid import datasets, retrieval

    step, _ = describe(str(run), step)
    params = restore_encoder(str(run), step, "student")
    extract = extractor(feature, (run / "config.json").read_text())
    found: dict[str, list[float]] = {"mAP": [], "rank1": [], "occluded": []}
    for camera in (1, 2):
        known = datasets.open_dataset("id_folders", str(people), camera)
        whole, gallery, occluded = extract.of_people(params, known)
        asked, stored = (
            retrieval.people_in(known, part) for part in (known.query, known.gallery)
        )
        for query, names in ((whole, ("mAP", "rank1")), (occluded, ("occluded",))):
            distances = retrieval.cosine_distances(query, gallery)
            scores = retrieval.score(distances, asked, stored)
            for name, value in zip(names, (scores.mAP, scores.rank1), strict=False):
                found[name].append(value)
    return {name: statistics.mean(values) for name, values in found.items()}


def write_tables(args: argparse.Namespace, rows: list[Row]) -> None:
    tables = []
    for kind in ("frozen, cls", "frozen, mean", "fine-tuned"):
        lines = [f"| {kind} | mAP | rank-1 | mAP, occluded | seeds |"]
        lines.append("| --- " * 5 + "|")
        for variant in ("untrained", *args.variants):
            own = [r for r in rows if (r["kind"], r["variant"]) == (kind, variant)]
            own = [r for r in own if r["seed"] < args.seeds]
            if own:
                cells = [spread(own, name) for name in ("mAP", "rank1", "occluded")]
                seeds = {r["seed"] for r in own}
                lines.append(f"| {variant} | {' | '.join(cells)} | {len(seeds)} |")
        tables.append("\n".join(lines))
    (args.out / "table.md").write_text("\n\n".join(tables) + "\n")


def spread(rows: list[Row], name: str) -> str:
    """Mean and standard error over the seeds of the means over the folds."""
    seeds = sorted({row["seed"] for row in rows})
    means = [
        100 * statistics.mean(row[name] for row in rows if row["seed"] == seed)
        for seed in seeds
    ]
    if len(means) == 1:
        return f"{means[0]:.1f}"
    error = statistics.stdev(means) / len(means) ** 0.5
    return f"{statistics.mean(means):.1f} +- {error:.1f}"


def main() -> None:
    args = read_arguments()
    sys.path.insert(0, str(_ROOT))
    # This process scores while others train: neither may take all of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out.absolute() / "jit"))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.people is None:
        crops, people = draw(args.out)
    else:
        crops, people = args.out / "crops", people_of(args.people)
        link(crops, [image for folder in args.crops for image in folder.glob("*.jpg")])
    Bench(args, crops.absolute(), people).run()
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
