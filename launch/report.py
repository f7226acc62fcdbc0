"""Runs the four tasks of the field from one pretraining run, and prints one table.

Example: python launch/report.py --workdir=runs/vitb --market=Market-1501
  --msmt17=MSMT17_V1 --occluded-duke=Occluded-Duke --out=runs/vitb_report

Supervised fine-tuning on each data set that is given, USL on Market-1501, and, with
MSMT17, UDA from it to Market-1501; one after the other, each a run of its own below
--out. Start it again with the same command to resume. Writes OUT/report.md.
Exit codes: 0 finished, 1 failed, 2 wrong settings, 75 interrupted and saved.
"""

import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import command_line
from absl import flags

from personmae_jax.errors import ConfigError
from personmae_jax.reid import datasets

_WORKDIR = flags.DEFINE_string("workdir", None, "The pretraining run.")
_MARKET = flags.DEFINE_string("market", None, "Folder of Market-1501.")
_MSMT17 = flags.DEFINE_string("msmt17", None, "Folder of MSMT17, with its lists.")
_OCCLUDED = flags.DEFINE_string("occluded-duke", None, "Folder of Occluded-Duke.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs; WORKDIR_report if absent.")
_SUPERVISED = flags.DEFINE_string(
    "supervised", "configs/finetune_market1501.py", "Settings of fine-tuning."
)
_UNSUPERVISED = flags.DEFINE_string(
    "unsupervised", "configs/usl_market1501.py", "Settings of USL and UDA."
)

# Others' mAP / rank-1 in percent, without re-ranking; None: not reported there.
_PUBLISHED = {
    "msmt17": [("PersonMAE ViT-B", 79.8, None, "arXiv 2311.04496, abstract")],
    "occluded_duke": [
        ("PersonMAE ViT-B", 69.5, None, "arXiv 2311.04496, abstract"),
        ("PersonViT ViT-B", 72.2, 79.8, "its README"),
        ("PASS ViT-B", 64.3, 74.0, "as PersonViT's README has it"),
        ("TransReID* ViT-B", 59.5, 67.4, "its README"),
    ],
    "usl_market1501": [
        ("TransReID-SSL ViT-S", 88.2, 94.2, "its README"),
        ("PASS ViT-S", 88.7, 95.0, "its README"),
    ],
    "uda_market1501": [
        ("TransReID-SSL ViT-S", 89.4, 95.4, "its README"),
        ("PASS ViT-S", 90.2, 95.8, "its README"),
    ],
}


class Task(NamedTuple):
    """One run: its folder below --out, what the table calls it, and its command."""

    name: str
    title: str
    launcher: str
    arguments: tuple[str, ...]


def tasks(out: pathlib.Path) -> list[Task]:
    """Those for which there is data; UDA comes after the run that it starts from.

    Raises:
      ConfigError: A folder is laid out otherwise, or nothing can be retrieved there.
    """
    begin = f"--config.init.workdir={_WORKDIR.value}"
    found = []
    for name, title, layout, path in (
        ("market1501", "Market-1501, supervised", "market1501", _MARKET.value),
        ("msmt17", "MSMT17, supervised", "msmt17", _MSMT17.value),
        ("occluded_duke", "Occluded-Duke, supervised", "market1501", _OCCLUDED.value),
    ):
        if path is not None:
            # All of them before the first run, which may take days.
            datasets.open_dataset(layout, path)
            data = (f"--config.data.layout={layout}", f"--config.data.path={path}")
            given = (f"--config={_SUPERVISED.value}", begin, *data)
            found.append(Task(name, title, "finetune.py", given))
    given = f"--config={_UNSUPERVISED.value}", f"--config.data.path={_MARKET.value}"
    if _MARKET.value is not None:
        title = "Market-1501, USL"
        found.append(Task("usl_market1501", title, "adapt.py", (*given, begin)))
    if _MARKET.value is not None and _MSMT17.value is not None:
        begin = f"--config.init.workdir={out / 'msmt17'}"
        title = "MSMT17 to Market-1501, UDA"
        found.append(Task("uda_market1501", title, "adapt.py", (*given, begin)))
    return found


def table(out: pathlib.Path, done: list[Task]) -> str:
    """Markdown: the last scores of every task beside those that others report."""
    lines = ["| task | encoder | mAP | rank-1 | source |", "|---|---|---|---|---|"]
    for task in done:
        scores = json.loads((out / task.name / "retrieval.json").read_text())
        cells = (f"{100 * scores[name]:.1f}" for name in ("mAP", "rank1"))
        source = f"{out / task.name}, step {scores['step']}"
        lines.append(f"| {task.title} | ours | {' | '.join(cells)} | {source} |")
        for who, mean_ap, rank1, where in _PUBLISHED.get(task.name, ()):
            rank = "" if rank1 is None else f"{rank1:.1f}"
            lines.append(f"| | {who} | {mean_ap:.1f} | {rank} | {where} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    if _WORKDIR.value is None:
        raise ConfigError("name the pretraining run: --workdir=RUN")
    out = pathlib.Path(_OUT.value or f"{_WORKDIR.value.rstrip('/')}_report")
    wanted = tasks(out)
    if not wanted:
        raise ConfigError("no data: give --market=DIR, --msmt17=DIR or the like")
    folder = pathlib.Path(__file__).parent
    for number, task in enumerate(wanted):
        print(f"{number + 1} of {len(wanted)}: {task.title}", flush=True)
        command = [sys.executable, str(folder / task.launcher), *task.arguments]
        code = subprocess.call([*command, f"--workdir={out / task.name}"])
        if code:
            return code
        text = table(out, wanted[: number + 1])
        (out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    command_line.run(main)
