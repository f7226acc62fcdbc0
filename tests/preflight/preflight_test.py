"""What a report says of a run that is not here, and of one that is."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import finetuning
import jax
import pytest
import unlabelled
from tiny import tiny_config

from personmae_jax.config import Config
from personmae_jax.config_finetune import FinetuneConfig
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine.trees import named_leaves
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.preflight import chips, estimate, text, trainings
from personmae_jax.preflight.model_flops import model_flops_per_image
from personmae_jax.preflight.text import describe

ROOT = pathlib.Path(__file__).parents[2]
LIBTPU = pathlib.Path(sys.prefix) / "libtpu"  # by the Makefile
KEYS = {
    "share_of_peak",
    "images_per_second_per_chip",
    "hbm_bytes",
    "hbm_limit_bytes",
    "fits",
    "model_flops_per_image",
    "estimated_cycles",
    "collectives",
}


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Runs launch/preflight.py without the shortcuts that conftest takes."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | env
    return subprocess.run(
        [sys.executable, "launch/preflight.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def build(cfg, devices=None):
    return trainings.build(cfg, devices or jax.devices(), 1000)


class Compiled(jax.stages.Compiled):
    """A compiled step of given size, in bytes."""

    def __init__(self, temporary: int, arguments: int):
        self.temp_size_in_bytes = temporary
        self.argument_size_in_bytes = arguments
        self.output_size_in_bytes = 50
        self.alias_size_in_bytes = 40
        self.generated_code_size_in_bytes = 7

    def memory_analysis(self):
        return self


@pytest.mark.parametrize("fsdp", [1, 2])
def test_memory_is_told_by_kind_for_one_chip(fsdp):
    cfg = tiny_config()
    cfg.encoder.width, cfg.mesh.fsdp = 128, fsdp
    program = build(cfg, jax.devices()[:2])
    state = program.init_state()

    def held(tree) -> int:
        shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]
        return sum(shard.nbytes for shard in shards)

    arguments = held(state) + estimate._bytes_per_chip(program.abstract_batch)
    report = estimate._memory(program, 10**9, Compiled(1000, arguments), 8)
    memory = report["memory"]
    assert memory["parameters"] == held(state.params)
    assert memory["optimizer"] == held(state.opt_state)
    assert memory["teacher"] == held(state.teacher_params)
    a_image = 2 * 16 * 8 * 3 + 4 * 4 + 4 * 4  # two regions, visible, geometry
    assert memory["batch"] == 4 * a_image
    assert memory["activations"] == 1000
    whole = sum(leaf.nbytes for leaf in named_leaves(state.params).values())
    assert (memory["parameters"] < whole) == (fsdp == 2)
    # What the compiler counts: arguments, an output that is none, code, temporary.
    assert report["hbm_bytes"] == held(state) + memory["batch"] + 10 + 7 + 1000
    assert report["hbm_bytes"] == sum(memory.values())


def test_the_largest_batch_fills_what_the_state_leaves():
    cfg = tiny_config()
    program = build(cfg, jax.devices()[:2])
    a_chip = estimate._bytes_per_chip(program.abstract_state)
    batch = estimate._bytes_per_chip(program.abstract_batch)
    compiled = Compiled(9 * batch, a_chip + batch)  # ten batches grow with 8 images
    limit = a_chip + 17 + 25 * batch
    report = estimate._memory(program, limit, compiled, 8)
    assert report["fits"]
    assert report["largest_batch_size"] == 20
    exact = estimate._memory(program, report["hbm_bytes"], compiled, 8)
    assert exact["fits"]
    assert exact["largest_batch_size"] == 8
    less = estimate._memory(program, report["hbm_bytes"] - 1, compiled, 8)
    assert not less["fits"]
    assert less["largest_batch_size"] == 6


PEOPLE = {
    "finetune": finetuning.tiny_finetuning,
    "unlabelled": unlabelled.tiny_unsupervised,
}


@pytest.mark.parametrize("kind", PEOPLE)
def test_the_memory_of_every_training_is_told_by_kind(kind):
    program = build(PEOPLE[kind](), jax.devices()[:2])
    state = program.init_state()
    memory = estimate._memory(program, 10**9, Compiled(1000, 10**6), 8)["memory"]
    assert memory["parameters"] == estimate._bytes_per_chip(state.params)
    assert memory["optimizer"] == estimate._bytes_per_chip(state.opt_state)
    assert "teacher" not in memory
    assert ("cluster memory" in memory) == (kind == "unlabelled")
    if kind == "unlabelled":
        vectors = 1000 * state.memory.vectors.shape[1]
        assert memory["cluster memory"] == 4 * (vectors + 2 * 1000 + 1)


@pytest.mark.parametrize("kind", PEOPLE)
def test_smaller_batches_of_people_have_whole_groups_and_two_of_them(monkeypatch, kind):
    cfg = PEOPLE[kind]()
    groups = trainings.batch_setting(cfg).split(".")[1]
    setattr(cfg.sampling, groups, 12)
    cfg.sampling.images = 3
    tried = refuse_above(monkeypatch, 0, field="image")
    assert not estimate.estimate(cfg, "v5e:1x2", 1000)["fits"]
    assert tried == [36, 18, 6]


@pytest.mark.parametrize("kind", PEOPLE)
def test_every_training_is_measured_here(kind):
    report = estimate.measure(PEOPLE[kind](), 100)
    assert report["images_per_second_per_chip"] > 0
    assert "100 images" in describe(report)


@pytest.mark.parametrize("kind", PEOPLE)
def test_the_flops_of_people_are_those_of_the_encoder_on_all_patches(kind):
    cfg = PEOPLE[kind]()
    pretraining = Config(encoder=cfg.encoder)
    pretraining.data.height, pretraining.data.width = cfg.data.height, cfg.data.width
    pretraining.loss.feature_weight = pretraining.loss.cls_weight = 0.0
    student = model_flops_per_image(pretraining)
    pretraining.loss.cls_weight = 0.1
    teacher_and_head = model_flops_per_image(pretraining) - student
    head = 3 * 2 * cfg.encoder.width**2
    assert model_flops_per_image(cfg) == 3 * (teacher_and_head - head)


def refuse_above(
    monkeypatch,
    batch_size: int,
    message="RESOURCE_EXHAUSTED: ...",
    field: str = "region_a",
) -> list:
    """Makes compiling fail for larger batches; returns the sizes that were tried."""
    tried = []

    def compile_step(program):
        tried.append(program.abstract_batch[field].shape[0])
        if tried[-1] > batch_size:
            raise jax.errors.JaxRuntimeError(message)
        held = estimate._bytes_per_chip(
            (program.abstract_state, program.abstract_batch)
        )
        return Compiled(1000 * tried[-1], held)

    monkeypatch.setattr(estimate, "_compile", compile_step)
    monkeypatch.setattr(
        estimate, "absent_devices", lambda _: (chips.CHIPS["v5e"], jax.devices()[:2])
    )
    return tried


def test_a_batch_that_does_not_fit_is_halved_until_one_does(monkeypatch):
    tried = refuse_above(monkeypatch, 13)
    cfg = tiny_config()
    cfg.train.batch_size = 44
    report = estimate.estimate(cfg, "v5e:1x2")
    assert tried == [44, 22, 10]
    assert report["fits"] is False
    assert report["batch_size"] == 44
    assert report["memory"]["activations"] == 44 * 1000
    assert report.keys() >= KEYS
    assert report["estimated_cycles"] is report["share_of_peak"] is None
    assert "does NOT fit" in describe(report)
    json.dumps(report)


def test_a_state_that_does_not_fit_is_said(monkeypatch):
    refuse_above(monkeypatch, 0)
    report = estimate.estimate(tiny_config(), "v5e:1x2")
    assert report["fits"] is False
    assert report["largest_batch_size"] == 0


def test_other_errors_of_the_compiler_are_not_taken_for_a_lack_of_memory(monkeypatch):
    refuse_above(monkeypatch, 0, "INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        estimate.estimate(tiny_config(), "v5e:1x2")


def test_speed_days_and_share_follow_from_the_seconds_of_a_step():
    cfg = tiny_config()
    program = build(cfg, jax.devices()[:4])
    speed = estimate._speed(program, 0.25, chips.CHIPS["v4"])
    assert speed["images_per_second_per_chip"] == 8
    assert speed["share_of_peak"] == pytest.approx(
        8 * model_flops_per_image(cfg) / 275e12
    )
    assert speed["days"] == pytest.approx(20 * 0.25 / 86400)
    assert speed["chip_hours"] == pytest.approx(4 * 20 * 0.25 / 3600)


def test_what_slower_kernels_leave_of_the_share_is_said_beside_it():
    report = {
        **dict.fromkeys(("days", "chip_hours", "model_flops_per_image"), 0.0),
        "images_per_second_per_chip": 1.0,
        "share_of_peak": 0.5,
        "estimated_cycles": 80.0,
        "clock": 1.5e9,
        "step_seconds": 1.0,
        "num_steps": 10,
        "kernels": [{"cycles": 15.0}, {"cycles": 5.0}],
    }
    told = "50.0 %; 40.0 % if the custom calls below take twice as long"
    assert told in "\n".join(text._speed(report))
    report["kernels"] = []
    assert "take twice" not in "\n".join(text._speed(report))


def test_the_length_of_the_run_is_that_of_luperson_unless_said():
    cfg = Config()
    cfg.train.epochs = 300
    num_records, words = trainings.assume(cfg, None)
    program = trainings.build(cfg, jax.devices(), num_records)
    report = estimate._describe_run(program, "v5e:2x4", words)
    assert report["num_steps"] == 306_170
    assert report["batch_size_per_chip"] == 512
    assert "4,180,243 images, as LUPerson has" in report["data"]
    assert "1,000 images" in trainings.assume(cfg, 1000)[1]


def test_synthetic_images_are_counted():
    cfg = finetuning.tiny_finetuning()  # 8 people to train on, 2 cameras, 2 shots
    assert trainings.assume(cfg, None) == (32, "32 synthetic images")
    assert trainings.assume(tiny_config(), None)[1] == "48,000 synthetic images"


def test_people_are_as_many_as_in_market_1501_unless_said():
    cfg = FinetuneConfig()  # 100 epochs of 16 x 4 images
    num_records, words = trainings.assume(cfg, None)
    assert "12,936 images, as Market-1501 has" in words
    program = trainings.build(cfg, jax.devices(), num_records)
    assert program.num_steps == 20_212
    kernel = program.abstract_state.params["classifier"]["kernel"]
    assert kernel.shape == (768, 751)
    program = trainings.build(UnsupervisedConfig(), jax.devices(), 32_621)
    assert program.num_steps == 10_000
    assert program.abstract_state.memory.vectors.shape == (32_621, 768)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e", "v5e:4x4"),
        ("v9:2x2", "one of v4, v5e, v5p, v6e"),
        ("v5e:0x4", "a shape in chips"),
        ("v5e:4x4x", "a shape in chips"),
        ("v5e:4x4x4", "a shape in chips"),  # libtpu would abort the process
        ("v6e:2x2x2", "a shape in chips"),  # it would take it for one
        ("v5e:1000x1000", "1,000,000 chips"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused(topology, words):
    with pytest.raises(ConfigError, match=words):
        chips.absent_devices(topology)


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RunError, match="pip install libtpu=="):
        chips.absent_devices("v5e:4x4")


def test_measuring_here_runs_the_step_and_needs_no_data(tmp_path):
    cfg = tiny_config()
    cfg.data.source = "tfds"
    file = tmp_path / "step.txt"
    report = estimate.measure(cfg, dump_hlo=str(file))
    assert "ENTRY" in file.read_text()
    assert report.keys() >= KEYS
    assert report["num_chips"] == jax.device_count()
    rate = report["images_per_second_per_chip"]
    assert rate * report["step_seconds"] * jax.device_count() == pytest.approx(8)
    assert report["share_of_peak"] is report["hbm_limit_bytes"] is None
    assert report["memory"]["activations"] > 0
    assert "Measured here" in describe(report)
    json.dumps(report)


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match="--dump-hlo=.* cannot be written"):
        estimate.measure(tiny_config(), dump_hlo=str(tmp_path / "none" / "x"))


def test_a_step_that_jaxlib_cannot_read_back_is_one_sentence():
    class Unreadable(Compiled):
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: unknown opcode\nin a.cc:3")

    with pytest.raises(RunError, match=r"\(INTERNAL: unknown opcode\), a fault of"):
        estimate._text(Unreadable(0, 0), None)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--topology=v5e:2x2", "--device=here")])
def test_the_command_wants_just_one_place(arguments):
    done = command("--config=configs/vitb.py", *arguments)
    assert done.returncode == 2
    assert "--topology=v5e:4x4" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_takes_the_config_of_any_training(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from personmae_jax.config_finetune import FinetuneConfig\n"
        "def get_config(): return FinetuneConfig()\n"
    )
    done = command(f"--config={file}", "--topology=v5e")
    assert done.returncode == 2
    assert "--topology=v5e is none" in done.stderr
    # A setting of another training than the file's.
    done = command(f"--config={file}", "--topology=v5e:2x2", "--config.cluster.k1=9")
    assert done.returncode == 2
    assert "cluster" in done.stderr
    assert "Traceback" not in done.stderr
    file.write_text("def get_config(): return {}\n")
    done = command(f"--config={file}", "--topology=v5e:2x2")
    assert done.returncode == 2
    assert "returned dict; it must return personmae_jax.config.Config or" in done.stderr


@pytest.mark.slow
def test_the_real_compiler_takes_a_step_without_labels():
    if not LIBTPU.exists():
        pytest.skip("libtpu is not installed: make .venv/.installed-clients")
    done = command(
        "--config=configs/usl_market1501.py",
        "--topology=v5e:2x2",
        "--json",
        "--num_records=1000",
        "--config.encoder.width=128",  # two heads of 64: the fused attention
        "--config.encoder.num_heads=2",
        "--config.encoder.depth=1",
        "--config.sampling.clusters=4",
        PYTHONPATH=str(LIBTPU),
        TPU_SKIP_MDS_QUERY="1",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["fits"]
    assert report["estimated_cycles"] > 10**4
    assert report["memory"]["cluster memory"] == 4 * (1000 * (128 + 2) + 1)


@pytest.mark.slow
def test_the_real_compiler_estimates_a_step_for_chips_that_are_not_here(tmp_path):
    if not LIBTPU.exists():
        pytest.skip("libtpu is not installed: make .venv/.installed-clients")
    file = tmp_path / "step.txt"
    done = command(
        "--config=configs/vits.py",
        "--topology=v5e:2x2",
        "--json",
        f"--dump-hlo={file}",
        "--config.encoder.width=128",  # two heads of 64: the fused attention
        "--config.encoder.num_heads=2",
        "--config.encoder.depth=2",
        "--config.pixel_predictor.width=128",
        "--config.pixel_predictor.num_heads=2",
        "--config.pixel_predictor.depth=1",
        "--config.pixel_predictor.memory_blocks=(0,-1)",
        "--config.feature_predictor.depth=1",
        "--config.feature_predictor.memory_blocks=(-1,)",
        "--config.train.batch_size=32",
        PYTHONPATH=str(LIBTPU),
        TPU_SKIP_MDS_QUERY="1",  # else it asks the network of a cloud
    )
    assert done.returncode == 0, done.stderr
    assert "no measurement" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() >= KEYS
    assert report["num_chips"] == 4
    assert report["fits"]
    assert report["estimated_cycles"] >= report["compiler_cycles"] > 10**5
    assert 0 < report["share_of_peak"] < 1
    (all_reduce,) = report["collectives"]
    assert all_reduce["kind"] == "all-reduce"
    # Gradients are summed over the chips, in bfloat16 or float32.
    parameters = report["memory"]["parameters"]
    assert parameters / 2 <= all_reduce["bytes"] < 1.5 * parameters
    text = file.read_text()
    assert '"estimated_cycles"' in text
    assert {*re.findall(r"attention_\w+ward", text)} == {
        "attention_forward",
        "attention_backward",
    }
