"""launch/report.py: tasks are looked at first, run one by one, and tabled."""

import json
import signal
import subprocess
import sys

import exported
import pytest
import unlabelled
from launching import ROOT, environment, wait_for_step
from PIL import Image


def start(*arguments, cwd, cache=None, stdout=subprocess.PIPE) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch/report.py"), *arguments],
        cwd=cwd,
        env=environment(cache or {"JAX_PLATFORMS": "cpu"}),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(*arguments, cwd=ROOT, cache=None) -> subprocess.CompletedProcess:
    with start(*arguments, cwd=cwd, cache=cache) as process:
        told = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, *told)


@pytest.fixture
def people(tmp_path):
    """A few in the layout of Market-1501, which is Occluded-Duke's, too."""
    unlabelled.market(tmp_path / "people")
    return tmp_path / "people"


def test_a_data_set_that_is_missing_is_said_before_the_first_run(tmp_path, people):
    out, none = tmp_path / "out", tmp_path / "none"
    done = report(
        *(f"--workdir={tmp_path}/run", f"--market={people}"),
        *(f"--occluded-duke={none}", f"--out={out}"),
    )
    assert done.returncode == 2
    assert f"'{none}' does not exist" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not out.exists()


def test_a_report_of_no_data_says_what_to_give(tmp_path):
    done = report(f"--workdir={tmp_path}/run")
    assert done.returncode == 2
    assert "give --market=DIR" in done.stderr


def test_every_data_set_has_its_own_settings_from_any_folder(tmp_path, people):
    told = subprocess.run(
        [
            *(sys.executable, "-c", _SAY_TASKS, str(ROOT / "launch")),
            *("--workdir=run", "--market=people", "--occluded-duke=people"),
        ],
        cwd=tmp_path,
        env=environment({"JAX_PLATFORMS": "cpu"}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout) == {
        task: str(ROOT / "configs" / f"{config}.py")
        for task, config in (
            ("market1501", "finetune_market1501"),
            ("occluded_duke", "finetune_occluded_duke"),
            ("usl_market1501", "usl_market1501"),
        )
    }


_SAY_TASKS = """
import json, pathlib, sys
sys.path.insert(0, sys.argv.pop(1))
import report
report.flags.FLAGS(sys.argv)
configs = {t.name: t.arguments[0] for t in report.tasks(report.open_path("out"))}
print(json.dumps({k: v.removeprefix("--config=") for k, v in configs.items()}))
"""


def test_what_links_in_its_folder_lead_to_is_never_written(tmp_path):
    (tmp_path / "empty.py").touch()
    out = tmp_path / "run_report"
    (out / "a").mkdir(parents=True)
    (out / "a/retrieval.json").write_text('{"mAP": 0.5, "rank1": null, "step": 3}')
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("report.md", "report.png"):
        (out / name).symlink_to(mine)
    subprocess.run(
        [sys.executable, "-c", _REPORT_ONE, str(ROOT / "launch"), "--workdir=run"],
        cwd=tmp_path,
        env=environment({"JAX_PLATFORMS": "cpu"}),
        check=True,
    )
    assert mine.read_text() == "mine"
    assert "| A | ours | 50.0 | nan |" in (out / "report.md").read_text()


_REPORT_ONE = """
import pathlib, sys
sys.path.insert(0, sys.argv.pop(1))
import report
report.flags.FLAGS(sys.argv)
report.output.guard()
launcher = str(pathlib.Path("empty.py").absolute())
report.tasks = lambda out: [report.Task("a", "A", launcher, ())]
report.main()
"""


def test_a_run_without_scores_is_named(tmp_path, people):
    (tmp_path / "empty.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", _REPORT_ONE, str(ROOT / "launch"), "--workdir=run"],
        cwd=tmp_path,
        env=environment({"JAX_PLATFORMS": "cpu"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RunError: A: the run has no scores" in done.stderr


def test_unsupervised_settings_of_any_config_train_on_the_data_that_is_given(
    tmp_path, people
):
    told = subprocess.run(
        [
            *(sys.executable, "-c", _SAY_DATA, str(ROOT / "launch")),
            *("--workdir=run", "--market=people"),
            "--unsupervised=configs/usl_quickstart.py",  # of synthetic people
        ],
        cwd=tmp_path,
        env=environment({"JAX_PLATFORMS": "cpu"}),
        capture_output=True,
        text=True,
        check=True,
    )
    given = {"--config.data.layout=market1501", "--config.data.path=people"}
    given |= {"--config.eval.path=None"}  # it is scored there, too
    assert given <= set(json.loads(told.stdout)["usl_market1501"])


_SAY_DATA = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import report
report.flags.FLAGS(sys.argv)
print(json.dumps({t.name: t.arguments for t in report.tasks(report.open_path("out"))}))
"""


@pytest.mark.slow
def test_tasks_are_run_one_by_one_interrupted_and_tabled(tmp_path, people, cache):
    source = exported.small_config()
    params = exported.trained_like(source.encoder)
    exported.make_run(tmp_path / "run", source, {3: (params, params)})
    for kind, body in _SETTINGS.items():
        text = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n{body}"
        (tmp_path / f"{kind}.py").write_text(text)
    settings = (f"--{kind}={kind}.py" for kind in _SETTINGS)
    words = ("--workdir=run", "--market=people", *settings)
    process = start(*words, cwd=tmp_path, cache=cache)
    with process:
        wait_for_step(process, tmp_path / "run_report/market1501", 2)
        process.send_signal(signal.SIGTERM)
        told, error = process.communicate(timeout=300)
    assert process.returncode == 75, error
    assert "Interrupted: saved step" in told
    assert not (tmp_path / "run_report/report.md").exists()
    # Nobody reads what it says: all tasks are run nevertheless.
    with open("/dev/full", "w") as full:
        process = start(*words, cwd=tmp_path, cache=cache, stdout=full)
    assert "standard output was not written" in process.communicate(timeout=600)[1]
    assert process.returncode == 1
    done = report(*words, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("holds a finished run") == 2
    lines = (tmp_path / "run_report/report.md").read_text()
    assert done.stdout.endswith(f"{lines}\n")
    for task, title in (
        ("market1501", "Market-1501, supervised"),
        ("usl_market1501", "Market-1501, USL"),
    ):
        scores = json.loads(
            (tmp_path / f"run_report/{task}/retrieval.json").read_text()
        )
        numbers = f"{100 * scores['mAP']:.1f} | {100 * scores['rank1']:.1f}"
        assert (
            f"| {title} | ours | {numbers} | {tmp_path}/run_report/{task}, step"
            in lines
        )
    assert "|  | PASS ViT-S | 88.7 | 95.0 | its README, best test score |" in lines
    with Image.open(tmp_path / "run_report/report.png") as picture:
        assert picture.size == (900, 432)


_SETTINGS = {
    # Long enough to be met in the middle.
    "supervised": """
from finetuning import tiny_finetuning
def get_config():
    cfg = tiny_finetuning()
    cfg.train.steps, cfg.log.every_steps, cfg.eval.every_epochs = 150, 1, 300.0
    return cfg
""",
    "unsupervised": """
from unlabelled import tiny_unsupervised
def get_config():
    return tiny_unsupervised()
""",
}
