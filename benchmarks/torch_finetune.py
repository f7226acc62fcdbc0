"""Does an export help? Fine-tunes it in plain PyTorch, and the same ViT from scratch.

Command: python benchmarks/torch_finetune.py --weights=FILE [--data=DIR]
FILE comes from launch/export_torch.py (layout mae). DIR holds train/ and val/ with a
folder for each identity (ID/CAMERA_*.jpg); without it, synthetic pedestrians that no
pretraining run saw are learned and others retrieved. Needs torch.

Both networks get the same images, batches, steps and learning rate; only the first
weights differ. The recipe is the usual one, cut short: identity loss with smoothed
labels and a batch-hard triplet loss around a BNNeck; flip, pad and crop.

Sources: Luo et al., Bag of Tricks (arXiv 1903.07071): BNNeck, label smoothing, 16 x 4
batches; TransReID (2102.04378): soft-margin triplet, cls token; first weights of the
network from scratch: timm, vision_transformer.py, `init_weights_vit_timm`.
"""

import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "launch"))

import command_line  # launch/ puts the repository on the path
import numpy as np
import torch
from absl import flags
from torch import nn
from torch.nn import functional

from personmae_jax.config import DataConfig, EncoderConfig, SyntheticConfig
from personmae_jax.data import images
from personmae_jax.data.images import Box
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.pytorch.vit import VisionTransformer
from personmae_jax.reid import datasets, retrieval

_WEIGHTS = flags.DEFINE_string("weights", None, "The export to start from.")
_DATA = flags.DEFINE_string("data", None, "Folder with train/ and val/.")
_IDENTITIES = flags.DEFINE_integer(
    "identities", 100, "Synthetic people to train on, and as many to test on.", 2
)
_STEPS = flags.DEFINE_integer("steps", 1200, "Updates of each fine-tuning.", 1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Repetitions, with seeds 0, 1, ...", 1)
_LR = flags.DEFINE_float("lr", 3e-3, "Highest learning rate of AdamW.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object on the last line.")

_PEOPLE, _SHOTS = 16, 4  # of one batch
_SMOOTHING = 0.1
_WARMUP = 0.1  # of all steps
_WEIGHT_DECAY = 0.05
_ARCHITECTURE = ("width", "depth", "num_heads", "mlp_ratio", "patch_size")
_FIRST_IDENTITY = 1_000_000  # synthetic people from here on are in no pretraining run


class Export(NamedTuple):
    """What a file holds that a fine-tuning needs."""

    tensors: dict[str, torch.Tensor]
    encoder: EncoderConfig
    size: tuple[int, int]  # height and width of the input, pixels
    mean: torch.Tensor  # (3, 1, 1), RGB in 0..1
    std: torch.Tensor


class Split(NamedTuple):
    """Images in memory, and who is in them."""

    pixels: torch.Tensor  # uint8, n x 3 x height x width
    people: retrieval.People


class ReidNet(nn.Module):
    """A ViT whose cls token goes through a BNNeck to a classifier."""

    def __init__(self, export: Export, num_identities: int):
        super().__init__()
        rows, columns = (side // export.encoder.patch_size for side in export.size)
        self.encoder = VisionTransformer(export.encoder, rows * columns)
        self.neck = nn.BatchNorm1d(export.encoder.width)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(export.encoder.width, num_identities, bias=False)
        self.register_buffer("mean", export.mean)
        self.register_buffer("std", export.std)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From uint8 images to features before and after the neck."""
        feature = self.encoder((pixels / 255 - self.mean) / self.std)[:, 0]
        return feature, self.neck(feature)


def init_like_timm(net: ReidNet) -> None:
    """Gives the encoder timm's first weights, the neck and the classifier theirs."""
    for module in net.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(net.encoder.pos_embed, std=0.02)
    nn.init.normal_(net.encoder.cls_token, std=1e-6)
    nn.init.normal_(net.classifier.weight, std=0.001)


def triplet_loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Soft-margin loss of every image's furthest friend and nearest stranger."""
    distances = torch.cdist(features, features)
    is_same = labels[:, None] == labels[None, :]
    furthest = distances.masked_fill(~is_same, -math.inf).amax(dim=1)
    nearest = distances.masked_fill(is_same, math.inf).amin(dim=1)
    return functional.softplus(furthest - nearest).mean()


def augment(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Flips half of the images, pads all by 4 % of the height, and crops them back."""
    height, width = pixels.shape[2:]
    pad = round(0.04 * height)
    padded = functional.pad(pixels, (pad, pad, pad, pad))
    out = torch.empty_like(pixels)
    for n, (y, x) in enumerate(rng.integers(0, 2 * pad + 1, (len(pixels), 2))):
        crop = padded[n, :, y : y + height, x : x + width]
        out[n] = crop.flip(-1) if rng.random() < 0.5 else crop
    return out


def train(net: ReidNet, split: Split, seed: int) -> None:
    """Fine-tunes all of it; the batches are a function of the seed."""
    rng = np.random.default_rng(seed)
    _, labels = np.unique(split.people.identities, return_inverse=True)
    images_of = [np.flatnonzero(labels == who) for who in range(labels.max() + 1)]
    steps = _STEPS.value
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=_LR.value, weight_decay=_WEIGHT_DECAY
    )
    warm = max(1, round(_WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * k / steps)),
    )
    net.train()
    for _ in range(steps):
        people = rng.permutation(len(images_of))[:_PEOPLE]
        chosen = np.concatenate(
            [
                rng.choice(images_of[who], _SHOTS, len(images_of[who]) < _SHOTS)
                for who in people
            ]
        )
        target = torch.from_numpy(labels[chosen])
        feature, necked = net(augment(split.pixels[chosen], rng))
        loss = functional.cross_entropy(
            net.classifier(necked), target, label_smoothing=_SMOOTHING
        ) + triplet_loss(feature, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def evaluate(net: ReidNet, query: Split, gallery: Split) -> dict[str, float]:
    """Returns mAP and rank-1 of the features after the neck, as fractions."""
    net.eval()
    of_query, of_gallery = (
        torch.cat([net(part)[1] for part in split.pixels.split(256)]).numpy()
        for split in (query, gallery)
    )
    distances = retrieval.cosine_distances(of_query, of_gallery)
    scores = retrieval.score(distances, query.people, gallery.people)
    return {"mAP": scores.mAP, "rank1": scores.rank1}


def read_export(path: str) -> Export:
    """Reads an export, the whole of which must fit the network.

    Raises:
      ConfigError: It is no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors, meta = content["model"], content["meta"]
        encoder = EncoderConfig(**{name: meta[name] for name in _ARCHITECTURE})
        mean, std = (torch.tensor(meta[k]).view(3, 1, 1) for k in ("mean", "std"))
        height, width = meta["image_size"]
        VisionTransformer(encoder, math.prod(meta["grid"])).load_state_dict(tensors)
    except Exception as error:  # torch raises nearly anything
        raise ConfigError(
            f"--weights={path} is not a file of launch/export_torch.py with the "
            f"layout mae ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    return Export(tensors, encoder, (height, width), mean, std)


def open_data() -> datasets.ReidDataset:
    if _DATA.value is None:
        people = SyntheticConfig(
            identities=2 * _IDENTITIES.value,
            cameras=3,  # those of the quickstart
            first_identity=_FIRST_IDENTITY,
        )
        dataset = datasets.synthetic_dataset(people, num_train=_IDENTITIES.value)
    else:
        dataset = datasets.open_dataset("id_folders", _DATA.value)
    datasets.check_training(dataset)
    return dataset


def load(
    dataset: datasets.ReidDataset, part: np.ndarray, size: tuple[int, int]
) -> Split:
    """Decodes the images of one part, each resized as a whole.

    Raises:
      RunError: An image cannot be used.
    """
    limits = DataConfig()
    pixels = np.empty((len(part), *size, 3), np.uint8)
    for n, index in enumerate(part.tolist()):
        try:
            image, _ = images.decode(
                dataset.records.read(index),
                max_pixels=limits.max_pixels,
                min_side=limits.min_side,
            )
        except (OSError, images.BadImage) as error:
            name = dataset.records.name(index)
            raise RunError(f"{name} cannot be used: {error}") from error
        images.crop_resize(image, Box(0, 0, *image.shape[:2]), out=pixels[n])
    people = retrieval.people_in(dataset, part)
    channels_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return Split(torch.from_numpy(channels_first), people)


def finetune(
    export: Export, splits: Sequence[Split], start: str, seed: int
) -> dict[str, dict[str, float]]:
    """Returns the scores before and after one fine-tuning.

    Args:
      export: Where the network comes from, or what it is like.
      splits: Query, gallery and training images.
      start: "export" or "random".
      seed: Of first weights, batches and augmentation.
    """
    query, gallery, training = splits
    torch.manual_seed(seed)
    net = ReidNet(export, len(np.unique(training.people.identities)))
    init_like_timm(net)  # of both, so that both classifiers start alike
    if start == "export":
        net.encoder.load_state_dict(export.tensors)
    before = evaluate(net, query, gallery)
    train(net, training, seed)
    return {"before": before, "after": evaluate(net, query, gallery)}


def print_table(results: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    """Prints means over the seeds, in percent, and the spread (least to most)."""
    print("| start | mAP before | rank-1 before | mAP | rank-1 |")
    print("| --- | --- | --- | --- | --- |")
    for start, runs in results.items():
        cells = []
        for when in ("before", "after"):
            for name in ("mAP", "rank1"):
                values = [100 * run[when][name] for run in runs]
                spread = f"{min(values):.1f} to {max(values):.1f}"
                cells.append(f"{np.mean(values):.1f} ({spread})")
        print(f"| {start} | {' | '.join(cells)} |")


def main() -> None:
    if _WEIGHTS.value is None:
        raise ConfigError("no --weights: name a file of launch/export_torch.py")
    export = read_export(_WEIGHTS.value)
    dataset = open_data()
    parts = (dataset.query, dataset.gallery, dataset.train)
    splits = [load(dataset, part, export.size) for part in parts]
    print(
        f"{dataset.where}: {len(dataset.train)} images to train on, "
        f"{len(dataset.query)} queries, {len(dataset.gallery)} in the gallery; "
        f"{_STEPS.value} steps of {_PEOPLE} x {_SHOTS} images, {_SEEDS.value} seeds"
    )
    results = {"random": [], "export": []}
    for seed in range(_SEEDS.value):
        for start, runs in results.items():
            begun = time.monotonic()
            runs.append(finetune(export, splits, start, seed))
            scores, seconds = runs[-1]["after"], time.monotonic() - begun
            print(
                f"seed {seed} {start}: {scores['mAP']:.3f} mAP, {seconds:.0f} s",
                flush=True,
            )
    print_table(results)
    if _JSON.value:
        print(json.dumps(results))


if __name__ == "__main__":
    command_line.run(main)
