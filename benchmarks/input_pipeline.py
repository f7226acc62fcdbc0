"""The data pipeline against a bare loop and a PyTorch DataLoader, on the same bytes.

In one run, round after round in turn, medians of all rounds, images/s:

  bare        a Python loop on one core: simplejpeg decodes, two crops are resized by
              cv2 into new arrays; bytes are in memory, boxes were drawn before
  pipeline_1  all of `PretrainBatches.iterate`, its thread and the consumer on one core:
              records read, shuffled, decoded, cut, flipped, masked, put into batches
  pipeline_best  the same as a run has it: default threads and workers, all cores
  torch       a DataLoader over a data set that reads a record, draws the same two
              boxes and the flip, and cuts them with Pillow into uint8 tensors of
              (3, height, width), torchvision's; as many workers as there are cores;
              where torch is installed

Then a process of its own tells the time from its start to the first batch, and its
peak memory after each of three epochs, an epoch being 64 batches at least.

Run: python benchmarks/input_pipeline.py --data FOLDER_OR_TFDS_DIR [--json]
     python benchmarks/input_pipeline.py --records 4180243   # start-up of a large set
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import cv2
import numpy as np
import simplejpeg

from personmae_jax.config import Config
from personmae_jax.data import regions
from personmae_jax.data.pipeline import PretrainBatches
from personmae_jax.data.records import Records, open_records
from personmae_jax.data.rng import BatchRng, Stream

_ROUNDS = 9
_BATCHES = 32  # in one round, which starts the pipeline and the DataLoader anew
_MAX_SAMPLE = 2000  # pictures of the bare loop
_SHARDS = 256
_CORES = os.sched_getaffinity(0)


def read_config(data: str, batch_size: int) -> Config:
    """The defaults, ViT-B's 256 x 128, on a tfds data set or a folder."""
    cfg = Config()
    cfg.data.path = data
    is_tfds = (Path(data) / "dataset_info.json").exists()
    cfg.data.source = "tfds" if is_tfds else "folder"
    cfg.train.batch_size = batch_size
    return cfg


class Pictures:
    """JPEG records and the numbers to cut them by; a PyTorch data set, too."""

    def __init__(self, records: Records, cfg: Config):
        step = max(1, len(records) // _MAX_SAMPLE)
        read = [(index, records.read(index)) for index in range(0, len(records), step)]
        jpegs = [(i, data) for i, data in read if data.startswith(b"\xff\xd8\xff")]
        self.indices, self.encoded = zip(*jpegs, strict=True)
        self.records, self.cfg = records, cfg
        self.size = (cfg.data.width, cfg.data.height)
        rng = BatchRng(cfg.train.seed, range(len(jpegs)))
        self.numbers = rng.uniform(Stream.REGIONS, regions.NUM_DRAWS)
        self.regions = [
            self.draw(row, *simplejpeg.decode_jpeg_header(data)[:2])
            for row, data in enumerate(self.encoded)
        ]

    def draw(self, row: int, height: int, width: int) -> regions.Regions:
        cfg, data = self.cfg.regions, self.cfg.data
        numbers = self.numbers[row]
        return regions.sample_regions(
            numbers, height, width, cfg, data.height, data.width
        )

    def bare(self) -> None:
        """Decodes and cuts every picture, as one would write it down."""
        for data, (box_a, box_b, _) in zip(self.encoded, self.regions, strict=True):
            image = simplejpeg.decode_jpeg(data)
            for y, x, height, width in (box_a, box_b):
                cv2.resize(
                    image[y : y + height, x : x + width],
                    self.size,
                    interpolation=cv2.INTER_CUBIC,
                )

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> tuple:
        """The two crops by Pillow, for a DataLoader."""
        import torch
        from PIL import Image

        data = self.records.read(self.indices[row])
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box_a, box_b, is_flipped = self.draw(row, image.height, image.width)
        if is_flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops = (
            image.resize(
                self.size, Image.Resampling.BICUBIC, (x, y, x + width, y + height)
            )
            for y, x, height, width in (box_a, box_b)
        )
        return tuple(torch.from_numpy(np.array(c)).permute(2, 0, 1) for c in crops)


def torch_loader(pictures: Pictures, num_images: int, batch_size: int):
    """A DataLoader over `num_images`, its workers started; None without torch."""
    if not importlib.util.find_spec("torch"):
        return None
    from torch.utils.data import DataLoader

    loader = DataLoader(
        pictures,
        batch_size=batch_size,
        sampler=[index % len(pictures) for index in range(num_images)],
        num_workers=len(_CORES),
        persistent_workers=True,
    )
    exhaust(loader)
    return loader


def exhaust(batches: Iterable) -> None:
    for _ in batches:
        pass


def consume(batches: PretrainBatches, steps: range) -> None:
    with contextlib.closing(batches.iterate(steps.start, steps.stop)) as iterator:
        exhaust(iterator)


def compare(cfg: Config) -> dict[str, float | None]:
    """Medians in images/s, see the module's docstring."""
    records = open_records(cfg.data)
    pictures = Pictures(records, cfg)
    num_images = _BATCHES * cfg.train.batch_size
    loader = torch_loader(pictures, num_images, cfg.train.batch_size)
    best = PretrainBatches(records, cfg)
    cfg = copy.deepcopy(cfg)
    cfg.data.num_threads = 1
    single = PretrainBatches(records, cfg)
    core = {min(_CORES)}
    works: dict[str, tuple[Callable[[range], object], int, set[int]]] = {
        "bare": (lambda _: pictures.bare(), len(pictures), core),
        "pipeline_1": (lambda steps: consume(single, steps), num_images, core),
        "pipeline_best": (lambda steps: consume(best, steps), num_images, _CORES),
    }
    if loader is not None:
        works["torch"] = (lambda _: exhaust(loader), num_images, _CORES)
    rates = {name: [] for name in works}
    for number in range(_ROUNDS + 1):
        for name, (work, num, cores) in works.items():
            os.sched_setaffinity(0, cores)  # threads that start now inherit it
            start = time.perf_counter()
            work(range(number * _BATCHES, (number + 1) * _BATCHES))
            rates[name].append(num / (time.perf_counter() - start))
    os.sched_setaffinity(0, _CORES)
    # The first round fills the caches.
    medians = {name: statistics.median(rates[name][1:]) for name in works}
    return {"torch": None, **medians}


def start_up(cfg: Config, started: float, num_epochs: int) -> dict[str, object]:
    """Start-up and memory of this process, which has done nothing else yet."""
    records = open_records(cfg.data)
    batches = PretrainBatches(records, cfg)
    per_epoch = max(64, len(records) // cfg.train.batch_size)
    peaks = []
    with contextlib.closing(batches.iterate(0)) as iterator:
        next(iterator)
        seconds = time.time() - started
        peak = peak_mib()
        for _ in range(num_epochs):
            for _ in range(per_epoch):
                next(iterator)
            peaks.append(peak_mib())
    return {
        "startup_s": seconds,
        "peak_mib": max(peaks, default=peak),
        "epochs_mib": peaks,
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_start_up(data: str, batch_size: int, num_epochs: int) -> dict:
    """Runs `start_up` in a fresh process."""
    command = [sys.executable, __file__, "--data", data, "--batch", str(batch_size)]
    command += ["--epochs", str(num_epochs), "--started", str(time.time())]
    return json.loads(subprocess.check_output(command).splitlines()[-1])


def write_records(folder: str, num_records: int) -> None:
    """A tfds data set of one tiny picture, many times."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    identity = tfds.core.dataset_info.DatasetIdentity(
        name="tiny",
        version=tfds.core.Version("1.0.0"),
        data_dir=folder,
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict({"image": tfds.features.Image()}),
    )
    picture = simplejpeg.encode_jpeg(np.zeros((16, 8, 3), np.uint8))
    example = info.features.encode_example({"image": io.BytesIO(picture)})
    record = info.features.serialize_example(example)
    template = tfds.core.ShardedFileTemplate(
        dataset_name="tiny",
        data_dir=Path(folder),
        split="train",
        filetype_suffix="array_record",
    )
    ends = [num_records * shard // _SHARDS for shard in range(_SHARDS + 1)]
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    for shard, length in enumerate(lengths):
        path = template.sharded_filepath(shard_index=shard, num_shards=_SHARDS)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(length):
            writer.write(record)
        writer.close()
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=lengths,
        num_bytes=num_records * len(record),
        filename_template=template,
    )
    info.set_splits(tfds.core.SplitDict([split]))
    info.set_file_format("array_record")
    info.write_to_directory(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="a folder of pictures, or a tfds data set")
    what.add_argument("--records", type=int, help="of a set made for the start-up")
    parser.add_argument("--batch", type=int, default=256, help="images in a batch")
    parser.add_argument("--json", action="store_true", help="one object, last line")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.started:
        cfg = read_config(args.data, args.batch)
        print(json.dumps(start_up(cfg, args.started, args.epochs)))
        return
    results: dict = {"bare": None, "pipeline_1": None, "pipeline_best": None}
    results["torch"] = None
    if args.data:
        results |= measure_start_up(args.data, args.batch, 3)
        results |= compare(read_config(args.data, args.batch))
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_records(folder, args.records)
            results |= measure_start_up(folder, args.batch, 0)
    print_table(results)
    if args.json:
        print(json.dumps(results))


def print_table(results: dict) -> None:
    bare = results["bare"]
    for name in ("bare", "pipeline_1", "pipeline_best", "torch"):
        if results[name] is not None:
            ratio = f"{results[name] / bare:5.2f} x bare"
            print(f"{name:14}{results[name]:8,.0f} images/s  {ratio}")
    print(f"{'start-up':14}{results['startup_s']:8.1f} s to the first batch")
    print(f"{'peak memory':14}{results['peak_mib']:8,.0f} MiB")
    if results["epochs_mib"]:
        after = ", ".join(f"{value:,.0f}" for value in results["epochs_mib"])
        print(f"{'after an epoch':14}{after} MiB")


if __name__ == "__main__":
    main()
