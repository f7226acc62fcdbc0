"""The same shards by an Apache Beam pipeline, where one machine is too small."""

import importlib.util
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from personmae_jax.errors import ConfigError, RunError, first_line
from personmae_jax.prepare.plan import Plan


def parse_options(runner: str, options: str = "") -> list[str]:
    """Beam's runner, e.g. DirectRunner, and its options as typed, for `run_shards`.

    Raises:
      ConfigError: apache-beam is not installed, or the options cannot be split.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise ConfigError(
            f"--beam-runner={runner} needs apache-beam; "
            "pip install -r requirements-beam.txt"
        )
    try:
        return [f"--runner={runner}", *shlex.split(options)]
    except ValueError as error:
        raise ConfigError(
            f"--beam-options={options} cannot be split as a shell does "
            f"({first_line(error)}); close every quotation mark"
        ) from error


def run_shards(
    function: Callable[[str, int], Any],
    folder: str,
    plan: Plan,
    shards: Sequence[int],
    options: Sequence[str],
) -> None:
    """Runs `function(folder, shard)` for every shard as an element of a pipeline.

    An element is a shard's number: every worker must see the sources and the folder
    under the same paths (a shared or mounted disk).

    Raises:
      ConfigError: Beam does not know the runner or an option.
      RunError: The pipeline failed.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        pipeline = beam.Pipeline(options=PipelineOptions([*options]))
    except (ValueError, SystemExit) as error:
        raise ConfigError(f"--beam-runner: {first_line(error)}") from error
    _ = (
        pipeline
        | "shards" >> beam.Create([*shards])
        | "spread" >> beam.Reshuffle()
        | "run" >> beam.Map(lambda shard: function(folder, shard) and None)
    )
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:  # each runner has its own
        raise RunError(
            f"the Beam pipeline failed ({first_line(error)}); shards stay: "
            "start again with the same command"
        ) from error
