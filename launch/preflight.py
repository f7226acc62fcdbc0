"""Says what a run would need and cost on TPUs that are not here.

Example: python launch/preflight.py --config=configs/vitb.py --topology=v5e:4x4

It compiles the very step of launch/pretrain.py, finetune.py or adapt.py, whichever the
config is for, with libtpu, which takes minutes, and asks for no data and no TPU. Exit
codes: 0 reported, 1 failed, 2 wrong settings.
"""

import json
import os

import command_line
from absl import flags

from personmae_jax.config import Config
from personmae_jax.config_finetune import FinetuneConfig, PeopleConfig
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.errors import ConfigError

_CONFIG = command_line.define_config(Config, FinetuneConfig, UnsupervisedConfig)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chip and shape: v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:16x16 ..."
)
_DEVICE = flags.DEFINE_enum(
    "device", None, ["here"], "Instead of --topology: run a few steps on what is here."
)
_NUM_RECORDS = flags.DEFINE_integer(
    "num_records", None, "Images of the data set; LUPerson's or Market-1501's.", 1
)
_DUMP_HLO = flags.DEFINE_string("dump-hlo", None, "A file for the compiled text.")
_JSON = flags.DEFINE_bool("json", False, "Print the report as JSON, on the last line.")


def main() -> None:
    cfg, topology = _CONFIG(), _TOPOLOGY.value
    if (topology is None) == (_DEVICE.value is None):
        raise ConfigError(
            "give either --topology=v5e:4x4 or the like, or --device=here"
        )

    if _DUMP_HLO.value and not os.path.isdir(os.path.dirname(_DUMP_HLO.value) or "."):
        raise ConfigError(
            f"--dump-hlo={_DUMP_HLO.value}: there is no such folder; make it first"
        )
    if isinstance(cfg, PeopleConfig):
        from personmae_jax.reid import init

        init.settle(cfg, None)
    from personmae_jax.preflight import estimate
    from personmae_jax.preflight.text import describe

    options = (_NUM_RECORDS.value, _DUMP_HLO.value)
    if topology is None:
        report = estimate.measure(cfg, *options)
    else:
        report = estimate.estimate(cfg, topology, *options)
    print(describe(report))
    if _JSON.value:
        print(json.dumps(report))


if __name__ == "__main__":
    command_line.run(main)
