"""Scores retrieval by an encoder: mAP, CMC and mINP by the Market-1501 protocol.

Example: python launch/evaluate.py --workdir=runs/vitb --dataset=market1501
  --data=Market-1501-v15.09.15 --out=scores

Or --torch-weights=FILE of a ViT, with --prefix where it holds several, and --grid,
--num-heads, --mean, --std where they are guessed wrong. --dataset=synthetic needs no
--data. --out gets retrieval.json and ranking.png: queries with what was found, who
matches in green.
Exit codes: 0 scored, 1 failed, 2 wrong arguments, 75 interrupted.
"""

import dataclasses
import json
from typing import Any

import command_line
from absl import flags

_CLUSTER = command_line.define_cluster()
_REQUEST = (
    flags.DEFINE_string("workdir", None, "Of a run, a folder or gs://..."),
    flags.DEFINE_string("torch-weights", None, "Instead: a .pth, .pt or .safetensors."),
    flags.DEFINE_enum("weights", None, ["student", "teacher"], "student if absent."),
    flags.DEFINE_integer("step", None, "Of the checkpoint; the latest if absent."),
    flags.DEFINE_integer(
        "height", None, "Pixels, with --torch-weights; else the file's.", 1
    ),
    flags.DEFINE_integer(
        "width", None, "Pixels, with --torch-weights; else the file's.", 1
    ),
    flags.DEFINE_string("prefix", None, "Of the ViT's names in the file."),
    command_line.define_numbers(
        "grid", int, 2, "ROWSxCOLUMNS of patches of the file's learned positions."
    ),
    flags.DEFINE_integer("num-heads", None, "Of the file's encoder.", 1),
    command_line.define_numbers("mean", float, 3, "R,G,B in 0..1, of its images."),
    command_line.define_numbers("std", float, 3, "R,G,B in 0..1, of its images."),
    flags.DEFINE_string(
        "dataset",
        None,
        "market1501 (DukeMTMC-reID, Occluded-Duke and CUHK03-NP, too), msmt17, "
        "id_folders, occluded_whole (Occluded-REID, P-DukeMTMC, Partial-REID), "
        "synthetic.",
    ),
    flags.DEFINE_string("data", None, "Folder of the data set."),
    flags.DEFINE_integer("query-camera", None, "Of id_folders; the lowest if absent."),
    flags.DEFINE_enum(
        "feature",
        "cls",
        ["cls", "mean", "stripes", "cls+mean", "patches", "neck"],
        "Of the tokens; or neck: after the batch norm of a run that was adapted, whose "
        "own scores are by it, or fine-tuned.",
    ),
    flags.DEFINE_bool("centre-cameras", False, "Takes each camera's mean feature off."),
    flags.DEFINE_bool("flip", False, "Adds the feature of the mirror image."),
    flags.DEFINE_bool("rerank", False, "Scores k-reciprocal distances."),
    flags.DEFINE_string("out", None, "Folder of what is written."),
    flags.DEFINE_bool("save-features", False, "Writes features.npz there, too."),
)
_JSON = flags.DEFINE_bool("json", False, "Print the scores as JSON, on the last line.")


def main() -> None:
    import jax

    from personmae_jax.engine import distributed, signals
    from personmae_jax.reid import evaluation
    from personmae_jax.reid.evaluation_inputs import Request

    asked: dict[str, Any] = {f.name.replace("-", "_"): f.value for f in _REQUEST}
    if distributed.join(**_CLUSTER()):
        signals.take_back_sigterm()  # nothing is saved here
    command_line.refuse_inside("--out", asked["out"], asked["data"])
    scores = evaluation.evaluate(Request(**asked))
    if jax.process_index() == 0:
        print(evaluation.table(scores))
        if _JSON.value:
            print(json.dumps(dataclasses.asdict(scores)))


if __name__ == "__main__":
    command_line.run(main)
