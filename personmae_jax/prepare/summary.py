"""The end of a preparation: rejected.csv, the summary, and what makes it a data set."""

import collections
import csv
import io
import json
import math
from typing import Any

import numpy as np
from etils import epath

from personmae_jax import foreign_files
from personmae_jax.data.images import Outcome
from personmae_jax.engine.storage import reporting_failure, write_whole
from personmae_jax.errors import RunError
from personmae_jax.prepare import manifest
from personmae_jax.prepare.plan import MARK, Plan
from personmae_jax.prepare.shard import DATASET, FEATURES

_SUMMARY = "summary.json"


def finish(folder: epath.Path, plan: Plan) -> None:
    """Turns finished shards into a data set; the same files whenever it is done.

    Raises:
      RunError: No image could be used, or something cannot be read or written.
    """
    shards = [
        manifest.read_checks(folder, shard, plan.num_rows(shard))
        for shard in range(plan.num_shards)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "reason"))
    for checks in shards:
        writer.writerows(map(_harmless, checks.rejected))
    rows = np.concatenate([checks.rows for checks in shards])
    stored = rows[rows["state"] <= manifest.CONVERTED]
    with reporting_failure(str(folder)):
        write_whole(folder / "rejected.csv", text.getvalue())
        if not len(stored):
            raise RunError(
                f"no image could be used; see {folder}/rejected.csv, fix the source "
                "and start again with another --out"
            )
        summary = _summarise(plan, shards, rows)
        write_whole(folder / _SUMMARY, json.dumps(summary, indent=2) + "\n")
        picture = _draw_sizes(stored["height"], stored["width"])
        (folder / "summary.png").write_bytes(picture)
        _write_info(folder, shards)


def _harmless(row: tuple[str, str]) -> tuple[str, str]:
    """Names come from strangers: a spreadsheet would run one that begins with `=`."""
    name, reason = row
    return ("'" + name if name[:1] in ("=", "+", "-", "@") else name), reason


def _summarise(
    plan: Plan, shards: list[manifest.Checks], rows: np.ndarray
) -> dict[str, Any]:
    stored = rows[rows["state"] <= manifest.CONVERTED]
    converted = stored[stored["state"] == manifest.CONVERTED]["outcome"].tolist()
    reasons = collections.Counter(
        reason for checks in shards for _, reason in checks.rejected
    )
    num_pixels = int((stored["height"].astype(np.int64) * stored["width"]).sum())
    # Python's integers: no order of adding shows in the last digit.
    sums = [[sum(int(c.sums[i, j]) for c in shards) for j in range(3)] for i in (0, 1)]
    mean = [total / num_pixels for total in sums[0]]
    std = [
        math.sqrt(max(0.0, square / num_pixels - m * m))
        for m, square in zip(mean, sums[1], strict=True)
    ]
    num_copies = int(manifest.find_copies(stored["digest"]).sum())
    num_dropped = int((rows["state"] == manifest.DUPLICATE).sum())
    return {
        "in_source": plan.num_listed,
        "wanted": plan.num_members,
        "stored": len(stored),
        "shards": plan.num_shards,
        "bytes": sum(checks.num_bytes for checks in shards),
        "kept_bit_for_bit": int((stored["state"] == manifest.STORED).sum()),
        "converted_to_png": {
            Outcome(value).reason if value != Outcome.PLAIN else "not a JPEG": count
            for value, count in sorted(collections.Counter(converted).items())
        },
        "rejected": int((rows["state"] == manifest.REJECTED).sum()),
        "exact_copies": num_copies + num_dropped,
        "exact_copies_dropped": num_dropped,
        "reasons": dict(sorted(reasons.items())),
        "height": _spread(stored["height"]),
        "width": _spread(stored["width"]),
        "mean": [m / 255 for m in mean],
        "std": [s / 255 for s in std],
    }


def _spread(sides: np.ndarray) -> dict[str, int]:
    """Least, middle and greatest, in pixels."""
    points = np.quantile(sides, (0, 0.5, 1), method="lower").astype(int).tolist()
    return dict(zip(("min", "median", "max"), points, strict=True))


def summary_text(folder: epath.Path) -> str:
    """The summary as a person reads it."""
    lines = [f"{folder}:"]
    try:
        for name, value in foreign_files.read_json(folder / _SUMMARY).items():
            if isinstance(value, dict):
                value = "; ".join(f"{key}: {x:,}" for key, x in value.items()) or "none"
            elif isinstance(value, list):
                value = ", ".join(f"{x:.4f}" for x in value) + " (RGB in 0..1)"
            else:
                value = f"{value:,}"
            lines.append(f"  {name.replace('_', ' ')}: {value}")
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{folder / _SUMMARY} is damaged; --check={folder} looks at the rest"
    return "\n".join(lines)


def _draw_sizes(heights: np.ndarray, widths: np.ndarray) -> bytes:
    """A PNG of two histograms, one above the other, from 0 to the 99.5 %."""
    # Half a second, so only at the end; without pyplot no display is ever asked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    panels = figure.subplots(2)
    for panel, what, sides in zip(
        panels, ("height", "width"), (heights, widths), strict=True
    ):
        end = int(np.quantile(sides, 0.995, method="lower")) + 1
        panel.hist(sides, bins=44, range=(0, end))
        panel.set(xlabel=f"{what} (pixels)", ylabel="images")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def _write_info(folder: epath.Path, shards: list[manifest.Checks]) -> None:
    """Writes `features.json`, then `dataset_info.json`; no TensorFlow."""
    # 1 s, so only when used
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, splits

    types = {"image": tfds.features.Image(shape=(None, None, 3))}
    types |= {name: tfds.features.Text() for name in FEATURES[1:]}
    info = tfds.core.DatasetInfo(
        builder=dataset_info.DatasetIdentity(
            name=DATASET,
            version=tfds.core.Version("1.0.0"),
            data_dir=str(folder),
            module_name="",
        ),
        features=tfds.features.FeaturesDict(types),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[
            int((c.rows["state"] <= manifest.CONVERTED).sum()) for c in shards
        ],
        num_bytes=sum(checks.num_bytes for checks in shards),
        filename_template=tfds.core.ShardedFileTemplate(
            dataset_name=DATASET,
            data_dir=folder,
            split="train",
            filetype_suffix="array_record",
        ),
    )
    info.set_splits(splits.SplitDict([split]))
    made = folder / "tasks"  # whose content is removed in the end
    info.write_to_directory(made)
    for name in ("features.json", MARK):
        (made / name).replace(folder / name)
