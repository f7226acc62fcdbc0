"""Which code made a checkpoint: the commit and the versions of libraries."""

import importlib.metadata
import pathlib
import platform
import subprocess

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


def git_revision() -> str | None:
    """Commit of the source checkout, with "+dirty" if files differ; None without."""
    here = pathlib.Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments),
            cwd=here.parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        # Installed inside somebody else's checkout, it is not ours.
        git("ls-files", "--error-unmatch", here.name)
        is_dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if is_dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Of Python and of the libraries whose change could change results."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version()} | libraries
