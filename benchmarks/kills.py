"""Does a run that is killed again and again end as one that nobody disturbed?

Kills pretraining, fine-tuning, training without labels, runs of two processes and the
preparation of data at random moments, starts each again with the same command until it
is done, and compares: every row and the hash of the parameters of a run, the cluster of
every image, pseudo labels and memory of the last checkpoint, every byte of a data set.
What lies in the folder afterwards that an undisturbed run does not leave is debris.

Run: python benchmarks/kills.py --out=runs/kills --kind=pretrain --kills=100
     python benchmarks/kills.py --out=runs/kills --kind=prepare --kills=40

results.jsonl gets a line for every run; with the same --out the count goes on where it
was stopped. Other kinds are finetune, adapt and two (one of two processes is killed).
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))
_KILLS_A_RUN = 4
_PATIENCE = 15.0  # seconds in which a process whose peer was killed may end by itself
_CLOCK = (
    "images_per_second",
    "data_seconds",
    "cluster_seconds",
)  # differs between any two runs
_NUM_IMAGES = 4000  # of the data set to prepare

_SMALL = [
    "--config.encoder.width=32",
    "--config.encoder.depth=2",
    "--config.encoder.num_heads=2",
    "--config.data.height=64",
    "--config.data.width=32",
    "--config.data.num_workers=0",
    "--config.checkpoint.every_steps=4",
]
_PRETRAIN = [
    "launch/pretrain.py",
    "--config=configs/quickstart.py",
    *_SMALL,
    "--config.pixel_predictor.memory_blocks=(0,-1)",
    "--config.feature_predictor.memory_blocks=(0,-1)",
    "--config.train.batch_size=8",
    "--config.train.steps=30",
    "--config.log.pictures_every_steps=15",
    "--config.eval.every_steps=15",
    "--config.eval.identities=8",
]
_FINETUNE = [
    "launch/finetune.py",
    "--config=configs/finetune_quickstart.py",
    *_SMALL,
    "--config.data.synthetic.identities=20",
    "--config.data.synthetic_train=16",
    "--config.sampling.identities=4",
    "--config.sampling.images=4",
    "--config.head.drop_path=0.1",
    "--config.train.steps=20",
]
_ADAPT = [
    "launch/adapt.py",
    "--config=configs/usl_quickstart.py",
    *_SMALL,
    "--config.data.synthetic.identities=16",
    "--config.data.synthetic_train=12",
    "--config.cluster.k1=8",
    "--config.cluster.min_samples=2",
    "--config.sampling.clusters=4",
    "--config.sampling.images=4",
    "--config.head.drop_path=0.1",
    "--config.train.rounds=4",
    "--config.train.steps_per_round=6",  # checkpoints in mid-round, too
    "--config.log.every_steps=1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills runs and compares.")
    parser.add_argument("--out", type=Path, required=True)
    kinds = ("pretrain", "prepare", "finetune", "adapt", "two")
    parser.add_argument("--kind", choices=kinds, required=True)
    parser.add_argument("--kills", type=int, default=100, help="in all, of this kind")
    arguments = parser.parse_args()
    campaign = Campaign(arguments.out.resolve(), arguments.kind)
    while (done := campaign.count()) < arguments.kills:
        campaign.run(number=len(campaign.results()), kills=arguments.kills - done)
    campaign.report()


class Campaign:
    """The runs of one kind, in OUT/KIND."""

    def __init__(self, out: Path, kind: str):
        self._kind, self._folder = kind, out / kind
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = out / "results.jsonl"
        self._images = self._folder / "images"
        if kind == "prepare" and not self._images.exists():
            _draw_images(self._images)
        self._undisturbed = self._folder / "undisturbed"
        shutil.rmtree(self._undisturbed, ignore_errors=True)
        for _ in range(2):  # the first one fills the compilation cache
            shutil.rmtree(self._undisturbed, ignore_errors=True)
            began = time.monotonic()
            codes, said, _ = self._start(self._undisturbed)
            if any(codes):
                sys.exit(f"the undisturbed run failed with {codes}: {said}")
            self._seconds = time.monotonic() - began
        self._wanted = _content(kind, self._undisturbed)
        self._names = _names(kind, self._undisturbed)

    def results(self) -> list[dict[str, Any]]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == self._kind]

    def count(self) -> int:
        return sum(len(row["kills"]) for row in self.results())

    def run(self, number: int, kills: int) -> None:
        """One run, killed up to `kills` times and then left to itself."""
        rng = random.Random(f"{self._kind} {number}")
        folder = self._folder / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        row: dict[str, Any] = {"kind": self._kind, "number": number, "kills": []}
        for _ in range(min(kills, _KILLS_A_RUN)):
            # Before this python is still importing.
            delay = self._seconds * rng.uniform(0.2, 0.9)
            codes, said, was_killed = self._start(folder, delay, rng)
            if not was_killed:
                break
            row["kills"].append([round(delay, 2), *codes])
        codes, said, _ = self._start(folder)
        row["codes"] = codes
        row["equal"] = codes[0] == 0 and _content(self._kind, folder) == self._wanted
        row["debris"] = sorted(_names(self._kind, folder) - self._names)
        row["lost"] = sorted(self._names - _names(self._kind, folder))
        if not row["equal"] or any(codes):
            row["said"] = said[-2000:]
            shutil.copytree(folder, self._folder / f"differs-{number}", symlinks=True)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def report(self) -> None:
        rows = self.results()
        debris = sorted({name for row in rows for name in row["debris"] + row["lost"]})
        print(
            f"{self._kind}: {self.count()} kills in {len(rows)} runs; "
            f"{sum(not row['equal'] for row in rows)} runs ended differently; "
            f"debris: {', '.join(debris) or 'none'}"
        )

    def _start(
        self, folder: Path, delay: float | None = None, rng: random.Random | None = None
    ) -> tuple[list[int], str, bool]:
        """Starts it; kills one process after `delay` seconds, if there still is one.

        Returns:
          The exit codes, what was said on standard error, and whether it was killed.
        """
        temporary = self._folder / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "TMPDIR": str(temporary),
        }
        with tempfile.TemporaryFile() as said:
            processes = [
                subprocess.Popen(
                    command,
                    cwd=_ROOT,
                    env=env,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,  # workers are killed with it
                )
                for command in self._commands(folder)
            ]
            was_killed = False
            if delay is not None and rng is not None:
                victim = rng.choice(processes)
                try:
                    victim.wait(delay)
                except subprocess.TimeoutExpired:
                    os.kill(victim.pid, signal.SIGKILL)
                    was_killed = True
            codes = [_end(p, _PATIENCE if was_killed else 3000.0) for p in processes]
            said.seek(0)
            return codes, said.read().decode(errors="replace"), was_killed

    def _commands(self, folder: Path) -> list[list[str]]:
        if self._kind == "prepare":
            script = ["launch/prepare_data.py", f"--source={self._images}"]
            return [[sys.executable, *script, f"--out={folder}", "--processes=2"]]
        scripts = {"finetune": _FINETUNE, "adapt": _ADAPT}
        script = scripts.get(self._kind, _PRETRAIN)
        command = [sys.executable, *script, f"--workdir={folder}"]
        if self._kind != "two":
            return [command]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        cluster = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
        return [[*command, *cluster, f"--process_id={i}"] for i in range(2)]


def _end(process: subprocess.Popen, patience: float) -> int:
    """The exit code; -9 of one that has to be killed for it."""
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _content(kind: str, folder: Path) -> object:
    """What must be equal to the last bit."""
    if kind == "prepare":
        files: Sequence[Path] = sorted(p for p in folder.rglob("*") if p.is_file())
        return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [{k: v for k, v in row.items() if k not in _CLOCK} for row in rows]
    if kind != "adapt":
        return rows
    return rows, (folder / "clusters.csv").read_text(), _last_labels(folder)


def _last_labels(folder: Path) -> list[str]:
    """Digests of the labels and the memory in the last checkpoint."""
    from etils import epath

    from personmae_jax.engine import checkpoint_files as files
    from personmae_jax.engine.trees import named_leaves

    last = epath.Path(folder) / "checkpoints"
    last /= str(files.find_step(last, None))
    wanted = {n: files.read_structure(last)[n] for n in ("labels", "memory")}
    found = named_leaves(files.restore_part(last, wanted))
    return [
        f"{name} {hashlib.sha256(found[name].tobytes()).hexdigest()}"
        for name in sorted(found)
    ]


def _names(kind: str, folder: Path) -> set[str]:
    """Names in the folder, but for those that orbax and TensorBoard choose."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    if kind == "prepare":
        return names
    names = {n for n in names if n.count("/") < 2 or ".part" in n or "tmp" in n}
    return {n for n in names if not n.startswith(("tensorboard/", "compiled/"))}


def _draw_images(folder: Path) -> None:
    from personmae_jax.synthetic import pedestrian

    folder.mkdir()
    jpegs = [pedestrian.encode_pedestrian(0, i, 0, 0) for i in range(50)]
    for i in range(_NUM_IMAGES):
        (folder / f"{i:05}.jpg").write_bytes(jpegs[i % len(jpegs)])


if __name__ == "__main__":
    main()
