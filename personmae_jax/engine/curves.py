"""Curves of a finished run: losses, scores and clusters against steps."""

import io

from absl import logging
from etils import epath

from personmae_jax.engine import pictures
from personmae_jax.engine.metrics import read_rows
from personmae_jax.errors import first_line

# Rows of metrics.jsonl, by panel; a panel none of whose rows a run has is left out.
_PANELS = {
    "loss": (
        *("loss", "pixel_loss", "feature_loss", "feature_weight"),  # it is ramped
        *("identity_loss", "triplet_loss"),
    ),
    "retrieval of unseen people": (
        *("retrieval_mAP", "retrieval_rank1", "occluded_mAP"),
        *("teacher_retrieval_mAP",),
    ),
    "clusters of images without labels": ("clusters", "outliers", "largest_cluster"),
    "agreement of labels": ("label_agreement", "known_ari"),
}


def write_curves(path: epath.Path) -> None:
    """Writes pictures/curves.png of the run in `path`, from its metrics.jsonl.

    Never fails a finished run: what prevents the picture is said in one warning.
    """
    try:
        pictures.write(path, "curves.png", _plot(read_rows(path)))
    except Exception as error:  # the run itself is finished and saved
        logging.warning("pictures/curves.png was not written: %s", first_line(error))


def _plot(rows: list[dict]) -> bytes:
    """Returns a PNG with the panels side by side."""
    # Half a second, so only at the end; without pyplot no display is ever asked for.
    from matplotlib.figure import Figure

    curves = {}
    for title, names in _PANELS.items():
        found = {
            name: [(x["step"], x[name]) for x in rows if x.get(name) is not None]
            for name in names
        }
        if any(found.values()):
            curves[title] = {name: points for name, points in found.items() if points}
    if not curves:
        raise ValueError("metrics.jsonl holds nothing to draw")
    figure = Figure(figsize=(5.5 * len(curves), 4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (title, found) in zip(panels, curves.items(), strict=True):
        for name, points in found.items():
            marker = "o" if len(points) < 30 else ""  # few scores, many losses
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, label=name, marker=marker, linewidth=1.2)
        panel.set(title=title, xlabel="step", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
