"""Promises about the preparation as a Beam pipeline."""

import functools
import importlib.util

import pytest
from image_files import members, write_folder, write_tar
from job_test import one_by_one, run, shards_of

from personmae_jax.errors import ConfigError, RunError
from personmae_jax.prepare import job as prepare_module
from personmae_jax.prepare.beam import parse_options, run_shards
from personmae_jax.prepare.job import prepare
from personmae_jax.prepare.plan import Plan, Request, make_plan
from personmae_jax.prepare.sources import open_reader

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="apache-beam is not installed: pip install -r requirements-beam.txt",
)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr(prepare_module, "_make_plan", make_plan)
    yield
    open_reader.cache_clear()


def test_without_beam_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-beam\.txt"):
        parse_options("DirectRunner")


def test_an_open_quotation_mark_in_the_options_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="--beam-options=--a='b .*close every quot"):
        parse_options("DirectRunner", "--a='b")


@needs_beam
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Beam's own
@pytest.mark.parametrize("is_dropped", [False, True])
def test_the_direct_runner_leaves_the_same_bytes_as_local_processes(
    tmp_path, is_dropped
):
    content = members(300) | {"bad": b"x", "copy": members(1).popitem()[1]}
    sources = (
        write_folder(tmp_path / "a", content),
        write_tar(tmp_path / "b.tar.gz", members(200), True),
    )
    run(tmp_path / "local", *sources, drop_duplicates=is_dropped)
    request = Request(source=tuple(map(str, sources)), drop_duplicates=is_dropped)
    threads = "--direct_num_workers=2 --direct_running_mode=multi_threading"
    options = parse_options("DirectRunner", threads * is_dropped)
    by_beam = functools.partial(run_shards, options=options)
    assert prepare(request, str(tmp_path / "beam"), by_beam) == 0
    assert shards_of(tmp_path / "beam") == shards_of(tmp_path / "local")


@needs_beam
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_failed_pipeline_is_told_and_its_shards_stay(tmp_path):
    source = write_tar(tmp_path / "b.tar", members(200))
    request = Request(source=(str(source),))

    def stopping(function, folder, plan, shards):
        one_by_one(function, folder, plan, shards[:1])
        open_reader.cache_clear()
        source.rename(tmp_path / "gone")
        options = parse_options("DirectRunner")
        run_shards(function, folder, plan, shards[1:], options)

    with pytest.raises(RunError, match="the Beam pipeline failed"):
        prepare(request, str(tmp_path / "out"), stopping)
    assert len([*(tmp_path / "out").glob("persons-*")]) == 1


@needs_beam
def test_an_unknown_runner_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--beam-runner"):
        run_shards(print, "", Plan({}, [], 0, 0, 0), [], parse_options("NoRunner"))
