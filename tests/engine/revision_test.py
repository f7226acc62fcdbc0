import subprocess

from personmae_jax.engine import revision


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert revision.git_revision() is None


def test_git_revision_names_the_commit_and_tells_changed_files(tmp_path, monkeypatch):
    file = tmp_path / "revision.py"
    file.write_text("x")
    monkeypatch.setattr(revision, "__file__", str(file))

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ("git", *who, *arguments)
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    assert revision.git_revision() is None  # in a checkout, but not part of it
    git("add", ".")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert revision.git_revision() == commit
    file.write_text("y")
    assert revision.git_revision() == commit + "+dirty"
