"""What all launchers do with arguments, paths and output."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from personmae_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import command_line  # noqa: E402

BLOCKS = "--config.pixel_predictor.memory_blocks"


@pytest.mark.parametrize(
    "given", [(f"{BLOCKS}=(0,)", f"{BLOCKS}=(-1,)"), (BLOCKS, "(0,)", BLOCKS, "(-1,)")]
)
def test_of_a_setting_given_twice_the_last_one_counts(given):
    argv = ["run", "--config=x.py", *given, "--config.train.steps=3"]
    kept = command_line._last_of_each_setting(argv)
    assert kept == [argv[0], argv[1], f"{BLOCKS}=(-1,)", "--config.train.steps=3"]


def test_the_file_may_stand_anywhere_and_of_two_the_last_one_counts():
    given = ("--config=a.py", "--config.train.steps=3", "--config", "b.py", "--v=1")
    kept = command_line._last_of_each_setting(["run", *given])
    assert sorted(kept[1:3]) == ["--config=b.py", "--v=1"]
    assert kept[3:] == ["--config.train.steps=3"]
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", "--config.train.batch_size=0"]
        + ["--config=none.py", "--config=configs/quickstart.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: config.train.batch_size=0 is out of range" in done.stderr


def test_an_empty_tuple_is_refused_rather_than_ignored():
    with pytest.raises(ConfigError, match="memory_blocks=.. is empty"):
        command_line._last_of_each_setting(["run", f"{BLOCKS}=()"])


def test_an_unknown_setting_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"did you mean --config.train.batch_size\?"):
        command_line._last_of_each_setting(["run", "--config.train.batchsize=3"])


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("--out=~/a", "--out=/home/me/a"),
        ("--config.data.path=~", "--config.data.path=/home/me"),
        ("~/a=b", "/home/me/a=b"),
        ("--config.init.workdir=~/a", "--config.init.workdir=~/a"),  # by its reader
        ("--out=a~", "--out=a~"),
    ],
)
def test_every_path_may_begin_with_the_home_folder(monkeypatch, given, expanded):
    monkeypatch.setenv("HOME", "/home/me")
    assert command_line._expand_home(given) == expanded


def test_the_home_folder_in_a_config_file_is_found(tmp_path):
    (tmp_path / "images").mkdir()
    file = tmp_path / "c.py"
    file.write_text(
        "from configs import quickstart\n"
        "def get_config():\n"
        "    cfg = quickstart.get_config()\n"
        "    cfg.data.source, cfg.data.path = 'folder', '~/images'\n"
        "    return cfg\n"
    )
    process = subprocess.run(
        [sys.executable, ROOT / "launch/pretrain.py", f"--config={file}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert process.returncode == 2
    assert f"config.data.path='{tmp_path}/images' holds no image" in process.stderr


def test_what_is_written_lies_outside_of_what_is_read(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for folder in ("data", "data/a/new", "link/new", "x/../data/new"):
        with pytest.raises(ConfigError, match="--out=.* lies in .*outside of it"):
            command_line.refuse_inside(
                "--out", f"{tmp_path}/{folder}", None, str(tmp_path / "data")
            )
    command_line.refuse_inside("--out", f"{tmp_path}/data2", str(tmp_path / "data"))
    command_line.refuse_inside("--out", "gs://bucket/a", str(tmp_path))


@pytest.mark.parametrize(
    ("launcher", "config"),
    [
        ("pretrain.py", "quickstart.py"),
        ("finetune.py", "finetune_quickstart.py"),
        ("adapt.py", "usl_quickstart.py"),
    ],
)
def test_a_run_lies_outside_of_the_people_that_score_it(tmp_path, launcher, config):
    words = [f"--config=configs/{config}", f"--workdir={tmp_path}/known/run"]
    words += ["--config.eval.layout=id_folders", f"--config.eval.path={tmp_path}/known"]
    (tmp_path / "known").mkdir()
    process = subprocess.run(
        [sys.executable, ROOT / "launch" / launcher, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == 2
    assert "whose files are read as data" in process.stderr
    assert not list((tmp_path / "known").iterdir())


SAY = """
import sys
sys.path.insert(0, "launch")
import command_line
from personmae_jax.errors import ConfigError

def main():
    print("\\u00e9 \\udcff", flush=True)
    if sys.argv[0] == "fail":
        raise ConfigError("no \\x1b[31m\\udcff")

command_line.run(main)
"""


def say(name: str, stdout, code: str = SAY) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = {name!r}\n{code}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stderr


WAIT_FOR_EVER = """
import sys, threading
sys.path.insert(0, "launch")
import command_line
from personmae_jax.errors import RunError

def main():
    threading.Thread(target=threading.Event().wait).start()
    raise RunError("a checkpoint could not be saved")

command_line.run(main)
"""


def test_a_failed_command_does_not_wait_for_threads_that_wait_for_ever():
    done = subprocess.run(
        [sys.executable, "-c", WAIT_FOR_EVER],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == "error: a checkpoint could not be saved\n"


LOST = {
    ">/dev/full": "No space left on device",
    ">&-": "Bad file descriptor",
    "": "Broken pipe",
}
LAUNCHERS = [p for p in (ROOT / "launch").glob("*.py") if "__main__" in p.read_text()]


def lose(how: str, *command) -> tuple[int, str]:
    """Exit code and standard error of a command whose output goes nowhere."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            ["sh", "-c", f'"$@" {how}', "sh", sys.executable, *command],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("how", LOST)
def test_output_that_is_lost_is_told_after_the_work(how, tmp_path):
    work = f"print('more'); open({str(tmp_path / 'result')!r}, 'w')\n\ncommand_line"
    told = f"standard output was not written: {LOST[how]}\n"
    assert lose(how, "-c", SAY.replace("\ncommand_line", f"    {work}")) == (1, told)
    assert (tmp_path / "result").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_output_that_is_lost_is_told_by_every_launcher(launcher):
    told = f"standard output was not written: {LOST['']}\n"
    assert lose("", launcher, "--help") == (2, told)


@pytest.mark.parametrize("how", [how.replace(">", "2>") for how in LOST])
def test_errors_that_nobody_reads_change_no_exit_code(how):
    fail = SAY.replace('"fail"', '"-c"')
    assert lose(f"{how or '2>&1'}", "-c", fail) == (2, "")


def test_a_pipe_that_is_full_for_a_while_loses_nothing():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = SAY.replace("print(", "print('x' * 300_000 + ")
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=writer) as process:
        os.close(writer)
        with open(reader, "rb") as read:
            assert len(read.read()) > 300_000
    assert process.returncode == 0


def test_standard_output_holds_no_escape_sequences_but_of_the_bar(tmp_path):
    code = """
sys.path[:0] = ["launch"]
import output
output.guard()
print("\\x1b[31m\\u202e")
print("\\x1b[1m", file=sys.stdout.unescaped, flush=True)
"""
    with open(tmp_path / "out", "w+b") as out:
        assert say("run", out, code) == (0, "")
        out.seek(0)
        assert out.read() == b"\\x1b[31m\\u202e\n\x1b[1m\n"


def test_sentences_hold_no_escape_sequences_whatever_names_they_quote():
    code, said = say("fail", subprocess.DEVNULL)
    assert (code, said) == (2, "error: no \\x1b[31m\\udcff\n")


PARSE = """
sys.path[:0] = ["launch"]
import command_line
command_line.define_workdir()
sys.argv = ["run", "--workdir", *sys.argv[:1]]
command_line.run(lambda: None)
"""


def test_a_folder_for_output_whose_name_is_not_utf_8_is_refused():
    assert say("g\xf6\u4e00", None, PARSE) == (0, "")
    code, said = say("g\udcff", None, PARSE)
    assert code == 2
    assert said.startswith("error: --workdir=g\\udcff is not read as UTF-8, which")


def test_a_locale_that_cannot_read_a_name_is_told_from_a_bad_name(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    assert say("g", None, PARSE) == (0, "")
    code, said = say(
        os.fsencode("g\xf6").decode("ascii", "surrogateescape"), None, PARSE
    )
    assert code == 2
    assert said.endswith("or set PYTHONUTF8=1 if it is\n")
    monkeypatch.setenv("PYTHONUTF8", "1")
    assert say("g\xf6", None, PARSE) == (0, "")


def test_links_that_go_round_are_no_traceback(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "x")
    command_line.refuse_inside("--out", str(tmp_path / "x"), str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such"),
        ("get_config = 3", "TypeError: 'int' object is not callable"),
        ("", "AttributeError: .* has no attribute 'get_config'"),
        ("raise SystemExit(0)", "SystemExit: 0"),  # neither --help nor success
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("open('/no/such')", "OSError: .*No such file or directory: ./no/such"),
        ("def get_config():\n  raise ValueError('a\\nb')", "ValueError: a b$"),
        (
            "class E(Exception):\n  def __str__(self): raise E\nraise E",
            "E: of a text that raises E$",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_a_config_file_that_fails_is_one_sentence(tmp_path, monkeypatch, text, words):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(ConfigError, match=f"^it cannot be used: {words}"):
        command_line._load(values["config"].parser.parse, f"{tmp_path}/x.py")


SET = """
sys.path[:0] = ["launch"]
import command_line
from personmae_jax.config import Config
from personmae_jax.config_check import check

sys.argv = ["run", "--config=configs/vits.py", "--config.data.path=x", *sys.argv[:1]]
settings = command_line.define_config(Config)
command_line.run(lambda: check(settings()))
"""


@pytest.mark.parametrize(
    "given",
    [
        ("--config.encoder.pos_embed_grid=None",),
        ("--config.optim.lr=0.1", "--config.optim.lr=None"),
        ("--config.pixel_predictor.width", "None"),
    ],
)
def test_none_is_a_value_of_a_setting_that_may_have_none(given):
    # vits.py gives the predictors a width: a number to ml_collections.
    code, said = say("", None, SET.replace("sys.argv[:1]", str(given)))
    assert (code, said) == (0, "")


def test_a_text_that_ends_like_none_is_a_text(tmp_path):
    given = (f"--config.data.path={tmp_path}/x=None",)
    show = "print(settings().data.path, file=sys.stderr)"
    shown = SET.replace("check(settings())", show)
    _, said = say("", None, shown.replace("sys.argv[:1]", str(given)))
    assert said == f"{tmp_path}/x=None\n"


def test_none_is_refused_of_a_setting_that_needs_a_value():
    code, said = say("--config.data.mean=None", None, SET)
    assert code == 2
    assert said.endswith(", but is NoneType None\n")


def test_a_config_file_may_return_anything_and_is_refused(tmp_path):
    (tmp_path / "x.py").write_text("get_config = lambda: None")
    code, said = say(f"--config={tmp_path}/x.py", None, SET)
    assert (code, len(said.splitlines())) == (2, 1)
    assert "get_config() returned NoneType; it must return" in said


def test_a_value_of_a_config_file_that_raises_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "x.py").write_text(
        "from configs import vits\n"
        "class Evil:\n"
        "  def __repr__(self): raise SystemExit(0)\n"
        "  __str__ = __eq__ = __getattr__ = __repr__\n"
        "def get_config():\n"
        "  cfg = vits.get_config()\n"
        "  cfg.data.mean = Evil()\n"
        "  return cfg\n"
    )
    alone = SET.replace('"--config=configs/vits.py", "--config.data.path=x", ', "")
    code, said = say(f"--config={tmp_path}/x.py", None, alone)
    assert (code, len(said.splitlines())) == (2, 1), said
    assert "config.data.mean must be of type" in said


def test_a_sentence_is_short_whatever_it_quotes():
    code, said = say(f"--config.train.steps={'9' * 9000}", None, SET)
    assert code == 2
    assert 300 < len(said) < 1000


FILL_THE_DISK = """
import resource
sys.path[:0] = ["launch"]
import command_line

def main():
    import numpy as np
    from etils import epath
    from personmae_jax.engine.checkpoint import Checkpoints

    state = {str(i): np.ones(1 << 10, np.float32) for i in range(300)}
    with Checkpoints(epath.Path(sys.argv[0]), keep=1, config={}) as checkpoints:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        checkpoints.save(1, state)

command_line.run(main)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_nothing_before_or_after_it(tmp_path):
    code, said = say(str(tmp_path), subprocess.DEVNULL, FILL_THE_DISK)
    (line,) = said.splitlines()
    assert code == 1
    assert line.startswith("error: a checkpoint could not be saved in")
    assert "(File too large); fix that and start again" in line


LOSE_A_DEVICE = """
sys.path[:0] = ["launch"]
import command_line

def main():
    import jax
    from personmae_jax.engine import distributed
    distributed.initialize()  # as a training does
    jax.devices()

command_line.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu", "none_such"])
def test_a_platform_without_a_device_is_refused_by_its_variable(platform, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    code, said = say("run", subprocess.DEVNULL, LOSE_A_DEVICE)
    assert code == 2
    assert said.splitlines()[-1].startswith(
        f"error: JAX_PLATFORMS={platform}: there is no such device, or "
    )
    assert "Traceback" not in said
    assert len(said.splitlines()) < 5
