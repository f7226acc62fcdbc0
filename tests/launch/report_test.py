"""launch/report.py: every task is looked at before the first one runs."""

import subprocess
import sys

import pytest
from launching import ROOT, environment

from personmae_jax.synthetic.pedestrian import encode_pedestrian


def report(*arguments):
    return subprocess.run(
        [sys.executable, "launch/report.py", *arguments],
        cwd=ROOT,
        env=environment({"JAX_PLATFORMS": "cpu"}),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def market(tmp_path):
    for part, identity in (
        ("bounding_box_train", 1),
        ("query", 2),
        ("bounding_box_test", 2),
    ):
        (tmp_path / "market" / part).mkdir(parents=True)
        for camera in (1, 2):
            file = tmp_path / "market" / part / f"{identity:04}_c{camera}s1_0_00.jpg"
            file.write_bytes(encode_pedestrian(0, identity, camera, 0))
    return tmp_path / "market"


def test_a_data_set_that_is_missing_is_said_before_the_first_run(tmp_path, market):
    out, none = tmp_path / "out", tmp_path / "none"
    done = report(
        *(f"--workdir={tmp_path}/run", f"--market={market}"),
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
