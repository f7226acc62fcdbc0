"""Settings of how a run goes, whatever it trains; see `config.py`."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each axis; a batch is split over all of them."""

    data: int = -1  # every device holds whole parameters; -1: all that fsdp leaves
    fsdp: int = 1  # parameters, moments and teacher are split over so many devices


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 3  # latest checkpoints; the initial state, step 0, is always kept


@dataclass(slots=True, kw_only=True)
class LogConfig:
    every_steps: int = 50
    pictures_every_steps: int = 1000
    num_pictures: int = 8  # rows in one picture


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    """Steps to record for TensorBoard's profile page."""

    start_step: int | None = None  # None: no trace
    num_steps: int = 3
