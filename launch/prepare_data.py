"""Prepares folders, zip, tar or LMDB of images for training.

Example: python launch/prepare_data.py --source LUPerson/lmdb --out data/luperson
  then --config.data.source=tfds --config.data.path=data/luperson

Start it again with the same command to go on where it was stopped. Exit codes:
0 finished, 1 failed, 2 wrong arguments, 75 interrupted.
"""

import functools

import command_line
from absl import flags

_SOURCE = flags.DEFINE_multi_string(
    "source",
    [],
    "Folder of images, zip, tar[.gz], LMDB, or a folder of those; more may follow.",
)
_OUT = flags.DEFINE_string("out", None, "Folder of the prepared data set.")
_CHECK = flags.DEFINE_string(
    "check", None, "Reads a prepared data set back and compares checksums; alone."
)
_KEEP_LIST = flags.DEFINE_string(
    "keep-list", None, "Names to keep, best first: one a line, or CFS_list.pkl."
)
_KEEP_FIRST = flags.DEFINE_string(
    "keep-first", None, "How many of --keep-list: 2000000, or 0.5 of them."
)
_MIN_SIDE = flags.DEFINE_integer(
    "min-side", 8, "Pixels; an image with a smaller side is rejected."
)
_DROP_DUPLICATES = flags.DEFINE_bool(
    "drop-duplicates", False, "Keeps the first of exact copies; reads all twice."
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Worker processes; one a core if absent.", lower_bound=1
)
_BEAM_RUNNER = flags.DEFINE_string(
    "beam-runner", None, "Works as an Apache Beam pipeline: DirectRunner, ..."
)
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam-options", "", "Of that runner: '--project=P --region=R'."
)
command_line.show("source", "out", "check", "keep-list", "keep-first", "min-side")


def main() -> int:
    from personmae_jax.errors import ConfigError
    from personmae_jax.prepare import beam, job, pool, verify
    from personmae_jax.prepare.plan import Request

    if _CHECK.value is not None:
        others = ("source", "out", "keep-list", "keep-first", "min-side")
        others += ("drop-duplicates", "beam-runner", "beam-options")
        if given := [f"--{n}" for n in others if flags.FLAGS[n].present]:
            raise ConfigError(f"--check=DIR stands alone; leave out {given[0]}")
        return verify.check(_CHECK.value, _PROCESSES.value)
    if _BEAM_OPTIONS.value and not _BEAM_RUNNER.value:
        raise ConfigError("--beam-options are of --beam-runner, which is not given")
    if not _SOURCE.value or not _OUT.value:
        raise ConfigError("give --source PATH... and --out DIR, or --check DIR")
    command_line.refuse_inside("--out", _OUT.value, *_SOURCE.value)
    request = Request(
        source=tuple(_SOURCE.value),
        keep_list=_KEEP_LIST.value,
        keep_first=_KEEP_FIRST.value,
        min_side=_MIN_SIDE.value,
        drop_duplicates=_DROP_DUPLICATES.value,
    )
    run_shards = functools.partial(pool.run_shards, num_processes=_PROCESSES.value)
    if _BEAM_RUNNER.value:
        options = beam.parse_options(_BEAM_RUNNER.value, _BEAM_OPTIONS.value)
        run_shards = functools.partial(beam.run_shards, options=options)
    return job.prepare(request, _OUT.value, run_shards)


if __name__ == "__main__":
    command_line.run(main, more_of="source")
