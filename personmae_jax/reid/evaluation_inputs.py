"""Inputs of an evaluation: the encoder, the data set, the folder; no device."""

import dataclasses
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

from personmae_jax.config import ModelConfig, SyntheticConfig
from personmae_jax.config_finetune import FinetuneConfig, FinetuneInitConfig
from personmae_jax.config_json import Settings, neck_feature
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine.checkpoint import describe, restore_encoder, restore_head
from personmae_jax.engine.workdir import read_settings
from personmae_jax.errors import ConfigError, RunError, first_line
from personmae_jax.pytorch import importer
from personmae_jax.reid import datasets
from personmae_jax.reid.dataset_layouts import LAYOUTS
from personmae_jax.reid.datasets import ReidDataset

_OF_FILES = ("prefix", "grid", "num_heads", "mean", "std")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate, and on whom: the flags of launch/evaluate.py."""

    workdir: str | None = None  # of a run; or
    torch_weights: str | None = None  # a .pth, .pt or .safetensors file of a ViT
    weights: str | None = None  # of a run: "student" (None) or "teacher"
    step: int | None = None  # of a run; None: the latest, 0: the untrained network
    height: int | None = None  # of a file: pixels of the images, if not those that
    width: int | None = None  # its positions are for
    prefix: str | None = None  # of a file; these as in FinetuneInitConfig
    grid: tuple[int, int] | None = None
    num_heads: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    dataset: str | None = None  # a key of LAYOUTS, or "synthetic"
    data: str | None = None  # folder of the data set
    query_camera: int | None = None  # of "id_folders" and "synthetic"
    feature: str = "cls"  # see reid/features.py; or "neck": after a run's batch norm
    centre_cameras: bool = False  # take each camera's mean feature off first
    flip: bool = False  # the sum with the feature of the mirror image
    rerank: bool = False  # score k-reciprocal distances
    out: str | None = None  # folder of what is written; None: nothing
    save_features: bool = False  # in `out`, too


class Subject(NamedTuple):
    """An encoder."""

    name: str  # what messages call it
    cfg: ModelConfig  # its architecture, and the size and statistics of its images
    params: dict[str, Any]  # numpy arrays, the encoder's or of `make_neck_encode`
    matmul_dtype: str = "auto"  # as config.train names it
    notes: tuple[str, ...] = ()  # sentences on how a file was read
    neck_token: str | None = None  # what the batch norm normalises; None: there is none


def open_subject(request: Request) -> Subject:
    """Reads the encoder that a request names.

    Raises:
      ConfigError: It names none or two, or what it names is not there.
      RunError: The checkpoint is damaged.
    """
    if (request.workdir is None) == (request.torch_weights is None):
        raise ConfigError(
            "name what to evaluate: either --workdir=RUN or --torch-weights=FILE"
        )
    if request.torch_weights is not None:
        return _open_file(request, request.torch_weights)
    return _open_run(request, str(request.workdir))


def _open_run(request: Request, workdir: str) -> Subject:
    for name in ("height", "width", *_OF_FILES):
        if getattr(request, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} goes with --torch-weights; a run has its own")
    cfg = read_settings(workdir)
    if isinstance(cfg, FinetuneConfig) and cfg.head.use_cameras:
        raise ConfigError(
            f"the run in {workdir} was fine-tuned with camera embeddings, which are "
            "not of its encoder; its own scores are in its retrieval.json"
        )
    try:
        step, _ = describe(workdir, request.step)
    except RunError as e:
        raise ConfigError(str(e)) from e  # nothing was done yet
    weights = request.weights or "student"
    token, notes = None, ()
    if request.feature == "neck":
        token = _neck_token(cfg, workdir)
    elif neck_feature(cfg) == "after":  # why these scores are not those of the run
        notes = ("Before the batch norm; the run's own scores are by --feature=neck.",)
    params = restore_encoder(workdir, step, weights)
    if token is not None:
        head = restore_head(workdir, step)
        params = {
            "params": {"encoder": params, "bottleneck": head["params"]["bottleneck"]},
            "statistics": head["statistics"],
        }
    return Subject(
        f"the {weights} of {workdir} at step {step}",
        *(cfg, params, cfg.train.matmul_dtype),
        notes=notes,
        neck_token=token,
    )


def _neck_token(cfg: Settings, workdir: str) -> str:
    """The token that a run's batch norm normalises."""
    if isinstance(cfg, UnsupervisedConfig):
        return cfg.head.feature
    if isinstance(cfg, FinetuneConfig):
        return "cls"
    raise ConfigError(
        f"the run in {workdir} was pretrained and has no batch norm after its encoder; "
        "--feature=neck is for runs of launch/finetune.py and launch/adapt.py, so take "
        "--feature=cls"
    )


def _open_file(request: Request, path: str) -> Subject:
    if request.weights is not None or request.step is not None:
        raise ConfigError(
            "--weights and --step go with --workdir; a file has one encoder"
        )
    if request.feature == "neck":
        raise ConfigError(
            "--feature=neck goes with --workdir; of a file the encoder alone is read, "
            "so take --feature=cls"
        )
    size = None
    if request.height is not None and request.width is not None:
        size = request.height, request.width
    elif request.height is not None or request.width is not None:
        raise ConfigError("give both --height and --width, in pixels, or neither")
    init = FinetuneInitConfig(torch_weights=path)
    for name in _OF_FILES:
        setattr(init, name, getattr(request, name))
    try:
        cfg = importer.settings_of_file(init, size)
        params, notes = importer.read_encoder(cfg)
    except ConfigError as e:  # in the words of those who train
        text = re.sub(
            r"(?:--)?config\.(?:init|data)\.(\w+)",
            lambda match: f"--{match[1].replace('_', '-')}",
            str(e),
        )
        raise ConfigError(text) from e
    return Subject(path, cfg, params, notes=notes)


def open_people(request: Request, own: SyntheticConfig) -> ReidDataset:
    """Opens the data set that a request names; synthetic people are others than `own`.

    Raises:
      ConfigError: There is no such data set, or it is laid out otherwise.
    """
    known = (*LAYOUTS, "synthetic")
    if request.dataset not in known:
        given = (
            "no" if request.dataset is None else f"--dataset={request.dataset} is no"
        )
        raise ConfigError(f"{given} data set: give --dataset={'|'.join(known)}")
    if request.dataset == "synthetic":
        if request.data is not None or request.query_camera is not None:
            raise ConfigError(
                "--dataset=synthetic draws its people; leave out --data and "
                "--query-camera"
            )
        return datasets.held_out_dataset(own)
    if request.data is None:
        raise ConfigError(f"--dataset={request.dataset} is read from --data=DIR")
    return datasets.open_dataset(request.dataset, request.data, request.query_camera)


def open_folder(request: Request) -> pathlib.Path | None:
    """Creates the folder `out`, and makes sure that it can be written.

    Raises:
      ConfigError: It cannot.
    """
    if request.out is None:
        if request.save_features:
            raise ConfigError("--save-features needs a folder: --out=DIR")
        return None
    if not request.out:
        raise ConfigError("--out= is empty; name a folder, or leave it out")
    if "://" in request.out:
        raise ConfigError(
            f"--out={request.out} is not local; write it here, then copy it"
        )
    folder = pathlib.Path(request.out).expanduser().absolute()
    if (folder / "config.json").exists():
        raise ConfigError(
            f"--out={request.out} is the folder of a run, whose own retrieval.json "
            "would be replaced; name another one"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ConfigError(
            f"--out={request.out} cannot be written ({first_line(e)}); name another "
            "folder"
        ) from e
    return folder
