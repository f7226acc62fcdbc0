"""Runs the four tasks of the field from one pretraining run, and prints one table.

Example: python launch/report.py --workdir=runs/vitb --market=Market-1501
  --msmt17=MSMT17_V1 --occluded-duke=Occluded-Duke --out=runs/vitb_report

Supervised fine-tuning on each data set that is given, USL on Market-1501, and, with
MSMT17, UDA from it to Market-1501; one after the other, each a run of its own below
--out. Start it again with the same command to resume. Writes OUT/report.md and .png.
Exit codes: 0 finished, 1 failed, 2 wrong settings, 75 interrupted and saved.
"""

import io
import json
import math
import pathlib
import subprocess
import sys
from typing import NamedTuple

import command_line
import output
from absl import flags
from etils import epath

from personmae_jax.engine import signals
from personmae_jax.engine.storage import open_path, write_whole
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.reid import datasets

_WORKDIR = flags.DEFINE_string("workdir", None, "The pretraining run.")
_MARKET = flags.DEFINE_string("market", None, "Folder of Market-1501.")
_MSMT17 = flags.DEFINE_string("msmt17", None, "Folder of MSMT17, with its lists.")
_OCCLUDED = flags.DEFINE_string("occluded-duke", None, "Folder of Occluded-Duke.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs; WORKDIR_report if absent.")
_SUPERVISED = flags.DEFINE_string(
    "supervised", None, "Settings of all fine-tuning; each data set's own if absent."
)
_UNSUPERVISED = flags.DEFINE_string(
    "unsupervised", None, "Settings of USL and UDA; those of Market-1501 if absent."
)

# Others' mAP / rank-1 in percent, without re-ranking; None: not reported there. READMEs
# at 256 x 128 pixels.
_PUBLISHED = {
    "market1501": [
        ("PASS ViT-B", 93.0, 96.8, "its README"),
        ("HAP ViT-B", 91.7, None, "its README"),
    ],
    "msmt17": [
        ("PersonMAE ViT-B", 79.8, None, "arXiv 2311.04496, abstract"),
        ("HAP ViT-B", 76.4, None, "its README"),
        ("PASS ViT-B", 71.8, 88.2, "its README"),
    ],
    "occluded_duke": [
        ("PersonMAE ViT-B", 69.5, None, "arXiv 2311.04496, abstract"),
        ("PersonViT ViT-B", 72.2, 79.8, "its README"),
        ("PASS ViT-B", 64.3, 74.0, "as PersonViT's README has it"),
        ("TransReID* ViT-B", 59.5, 67.4, "its README"),
    ],
    "usl_market1501": [
        ("TransReID-SSL ViT-S", 88.2, 94.2, "its README, best test score"),
        ("PASS ViT-S", 88.7, 95.0, "its README, best test score"),
    ],
    "uda_market1501": [
        ("TransReID-SSL ViT-S", 89.4, 95.4, "its README, best test score"),
        ("PASS ViT-S", 90.2, 95.8, "its README, best test score"),
    ],
}


_LAUNCH = pathlib.Path(__file__).resolve().parent


class Task(NamedTuple):
    """One run: its folder below --out, what the table calls it, and its command."""

    name: str
    title: str
    launcher: str
    arguments: tuple[str, ...]


class Result(NamedTuple):
    """A line of the table; scores in percent, None where nobody reports one."""

    task: str
    encoder: str
    mean_ap: float
    rank1: float | None
    source: str


def tasks(out: epath.Path) -> list[Task]:
    """Those for which there is data; UDA comes after the run that it starts from.

    Raises:
      ConfigError: A folder is laid out otherwise, or nothing can be retrieved there.
    """
    begin = f"--config.init.workdir={_WORKDIR.value}"
    occluded, found = _OCCLUDED.value, []
    for name, title, layout, recipe, path in (
        ("market1501", "Market-1501", "market1501", "market1501", _MARKET.value),
        ("msmt17", "MSMT17", "msmt17", "market1501", _MSMT17.value),
        ("occluded_duke", "Occluded-Duke", "market1501", "occluded_duke", occluded),
    ):
        if path is not None:
            # All of them before the first run, which may take days.
            datasets.open_dataset(layout, path)
            data = _data(layout, path)
            config = _config(_SUPERVISED.value, f"finetune_{recipe}")
            given = (config, begin, *data)
            found.append(Task(name, f"{title}, supervised", "finetune.py", given))
    data = _data("market1501", _MARKET.value)
    if _MARKET.value is not None:
        given = (_config(_UNSUPERVISED.value, "usl_market1501"), begin, *data)
        found.append(Task("usl_market1501", "Market-1501, USL", "adapt.py", given))
    if _MARKET.value is not None and _MSMT17.value is not None:
        begin = f"--config.init.workdir={out / 'msmt17'}"
        given = (_config(_UNSUPERVISED.value, "uda_market1501"), begin, *data)
        title = "MSMT17 to Market-1501, UDA"
        found.append(Task("uda_market1501", title, "adapt.py", given))
    return found


def _data(layout: str, path: str | None) -> tuple[str, ...]:
    """Has a run train on and be scored by this data, whatever its settings name."""
    names = {"layout": layout, "path": path, "query_camera": None}
    return (
        *(f"--config.data.{name}={value}" for name, value in names.items()),
        *("--config.eval.path=None", "--config.eval.layout=market1501"),
    )


def _config(given: str | None, name: str) -> str:
    return f"--config={given or _LAUNCH.parent / 'configs' / f'{name}.py'}"


def results(out: epath.Path, done: list[Task]) -> list[Result]:
    """The last scores of every task, each followed by those that others report.

    Raises:
      RunError: A task has none.
    """
    found = []
    for task in done:
        file = out / task.name / "retrieval.json"
        if not file.exists():
            raise RunError(
                f"{task.title}: the run has no scores ({file}); its settings turn them "
                "off, or the data has no queries"
            )
        scores = json.loads(file.read_text())
        # None where features could not be ranked, such as a collapsed network's.
        known = {name: math.nan if x is None else x for name, x in scores.items()}
        mean_ap, rank1 = 100 * known["mAP"], 100 * known["rank1"]
        source = f"{out / task.name}, step {scores['step']}"
        found.append(Result(task.title, "ours", mean_ap, rank1, source))
        for published in _PUBLISHED.get(task.name, ()):
            found.append(Result(task.title, *published))
    return found


def table(found: list[Result]) -> str:
    """Markdown."""
    lines = ["| task | encoder | mAP | rank-1 | source |", "|---|---|---|---|---|"]
    for task, encoder, mean_ap, rank1, source in found:
        title = task if encoder == "ours" else ""
        rank = "" if rank1 is None else f"{rank1:.1f}"
        lines.append(f"| {title} | {encoder} | {mean_ap:.1f} | {rank} | {source} |")
    return "\n".join(lines) + "\n"


def chart(found: list[Result]) -> bytes:
    """PNG: a bar of mAP for every line of the table, a panel for every task."""
    from matplotlib.figure import Figure

    by_task = {line.task: [] for line in found}
    for line in found:
        by_task[line.task].append(line)
    widths = [len(lines) + 0.5 for lines in by_task.values()]  # a bar is an inch
    figure = Figure(figsize=(sum(widths) + 0.5, 3.6), layout="constrained")
    panels = figure.subplots(
        *(1, len(widths)), squeeze=False, sharey=True, width_ratios=widths
    )[0]
    for panel, (title, lines) in zip(panels, by_task.items(), strict=True):
        names = [line.encoder.replace(" ", "\n") for line in lines]
        colours = ["C0" if line.encoder == "ours" else "0.75" for line in lines]
        bars = panel.bar(names, [line.mean_ap for line in lines], color=colours)
        panel.bar_label(bars, fmt="%.1f")
        panel.set(title=title.replace(", ", "\n"), ylim=(0, 100))
        panel.set_xlim(-0.7, len(lines) - 0.3)  # bars of one width in all panels
        panel.tick_params("x", labelsize="small")
    panels[0].set_ylabel("mAP in percent")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def main() -> int:
    if _WORKDIR.value is None:
        raise ConfigError("name the pretraining run: --workdir=RUN")
    out = open_path(_OUT.value or f"{_WORKDIR.value.rstrip('/')}_report")
    wanted = tasks(out)
    if not wanted:
        raise ConfigError("no data: give --market=DIR, --msmt17=DIR or the like")
    text = ""
    for number, task in enumerate(wanted):
        print(f"{number + 1} of {len(wanted)}: {task.title}", flush=True)
        command = [sys.executable, str(_LAUNCH / task.launcher), *task.arguments]
        command.append(f"--workdir={out / task.name}")
        # A task that tells nobody its scores ends with 1, and so would the report.
        told = subprocess.DEVNULL if output.lost() else None
        with (
            subprocess.Popen(command, stdout=told) as run,
            signals.passed_on(run.pid),
        ):
            code = run.wait()
        if code:
            return code
        found = results(out, wanted[: number + 1])
        text = table(found)
        write_whole(out / "report.md", text)
        write_whole(out / "report.png", chart(found))
    print(text)
    return 0


if __name__ == "__main__":
    command_line.run(main)
