"""Runs of `soak_training.py`: config, commands in forked processes, comparison of their outputs.

Imports take longer than such a run, so commands are forked from this process, which has made them.
It must have no other threads.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from reliability import FaultError

from i3d_gn import cli
from i3d_gn.engine.checkpoint import list_checkpoints, load_checkpoint
from i3d_gn.engine.run_log import read_log
from i3d_gn.engine.stop_signals import end_with_parent

# What commands import when they run.
for _name in (
    "i3d_gn.video.train",
    "i3d_gn.video.evaluate",
    "torch.utils.tensorboard",
    "PIL.Image",
):
    importlib.import_module(_name)

NUM_TRAIN, STEPS, BATCH = 12, 12, 4
CONFIG = """
model: {{name: i3d_tiny, num_classes: 6, norm: {norm}}}
data:
  train_index: {data}/train.parquet
  val_index: {data}/val.parquet
  num_workers: 1
  timeout_seconds: {timeout}
clip: {{num_frames: 8, stride: 2, short_side_min: 40, short_side_max: 48, crop_size: 36}}
train:
  steps: {steps}
  global_batch_size: {batch}
  clips_per_gpu: 2
  lr: 0.01
  lr_batch_size: 4
  milestones: [8]
  log_every: 2
  validate_every: 4
  checkpoint_every: 3
  keep_checkpoints: 2
  precise_bn_iterations: 2
  rank_timeout_minutes: 0.2
test: {{num_clips: 3, short_side: 40, clips_per_forward: 2}}
output_dir: {output}
"""


class Command:
    """A command of `i3d-gn` that runs in a child process, or in one per rank."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        ranks: int = 1,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.log = log
        log.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.statuses: dict[int, int] = {}
        self.pids = []
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                self._child(arguments, rank, ranks, port, before)
            self.pids.append(pid)

    def _child(
        self, arguments: list[str], rank: int, ranks: int, port: int, before: Callable[[], None]
    ) -> None:
        status = 70
        try:
            end_with_parent(signal.SIGKILL)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            if ranks > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                    LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            before()
            status = cli.main(arguments)
        except BaseException:
            with contextlib.suppress(OSError):
                os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def wait(self, seconds: float) -> int | None:
        """The largest status, negative for a signal alone; None if not all have ended in time."""
        deadline = time.monotonic() + seconds
        while not self._all_ended():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)
        return max(self.statuses.values(), key=abs)

    def wait_for(self, rank: int, seconds: float) -> int | None:
        """The status of one rank, None if it has not ended in time."""
        deadline = time.monotonic() + seconds
        while self.pids[rank] not in self.statuses:
            self._all_ended()
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)
        return self.statuses[self.pids[rank]]

    def _all_ended(self) -> bool:
        for pid in self.pids:
            if pid not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def send(self, number: signal.Signals) -> None:
        """Signal those that have not ended."""
        self._all_ended()
        for pid in self.pids:
            if pid not in self.statuses:
                os.kill(pid, number)

    def kill(self) -> None:
        """End all, also stopped ones."""
        for pid in [p for parent in self.pids for p in children(parent)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.send(signal.SIGKILL)
        self.wait(60)

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Run:
    """A run in `folder`, with its config beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "run"
        self.checkpoints = self.output / "checkpoints"
        self.seconds = 0.0

    def train(self, *overrides: str, **options: Any) -> Command:
        """Start or resume training."""
        config = str(self.folder / "config.yaml")
        return Command(["train", config, *overrides], self.folder / "train.log", **options)

    def evaluate(self, **options: Any) -> Command:
        """Start or resume the test."""
        config = str(self.folder / "config.yaml")
        return Command(["evaluate", config], self.folder / "test.log", **options)

    def results(self) -> dict[str, Any]:
        """The results of the test."""
        (path,) = self.output.glob("test_*/results.json")
        return json.loads(path.read_text())

    def scores(self) -> dict[str, list[float]]:
        """The scores of each video."""
        (path,) = self.output.glob("test_*/scores.parquet")
        rows = pq.read_table(path, use_threads=False).to_pylist()
        return {row["path"]: row["scores"] for row in rows}


class Soak:
    """Data, and undisturbed runs to compare with."""

    def __init__(self, folder: Path, time_limit: float) -> None:
        self.folder = folder
        self.time_limit = time_limit
        self.data = folder / "data"
        videos = self.data / "videos"
        train, val = self.data / "train.parquet", self.data / "val.parquet"
        # Not forked: these commands start processes that import what this one is running.
        for arguments in (
            ["make-motion-clips", videos, "--train-clips=2", "--val-clips=1", "--num-frames=20"],
            ["index", videos / "train", train],
            ["index", videos / "val", val, "--label-map", train],
        ):
            command = [sys.executable, "-m", "i3d_gn", *map(str, arguments), "--workers=1"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.references: dict[str, Run] = {}

    def run(self, name: str, *, data: Path | None = None, timeout: float = 120.0) -> Run:
        """A run in an empty directory; its norm is that of its name."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        norm = "bn" if "bn" in name else "gn"
        text = CONFIG.format(
            norm=norm, data=data or self.data, timeout=timeout, steps=STEPS, batch=BATCH,
            output=folder / "run",
        )  # fmt: skip
        (folder / "config.yaml").write_text(text)
        return Run(folder)

    def reference(self, norm: str) -> Run:
        """The undisturbed run, tested."""
        if norm not in self.references:
            run = self.run(f"reference-{norm}")
            started = time.monotonic()
            self.finish(run.train())
            run.seconds = time.monotonic() - started
            self.finish(run.evaluate())
            self.references[norm] = run
        return self.references[norm]

    def finish(self, command: Command) -> str:
        """Wait for a command that must succeed; its output."""
        status = self.wait(command)
        if status:
            raise FaultError("lost", f"status {status}: {command.output()[-400:]}")
        return command.output()

    def wait(self, command: Command) -> int:
        """The status of a command, which must end in time."""
        status = command.wait(self.time_limit)
        if status is None:
            command.kill()
            raise FaultError("hung", command.output()[-400:])
        return status

    def check(self, run: Run, reference: Run) -> None:
        """Compare a finished run."""
        if difference := same_run(run, reference):
            raise FaultError("silently wrong", difference)


def same_run(run: Run, reference: Run, *, log_tolerance: float = 0.0) -> str:
    """In what the outputs of two finished runs differ; empty if in nothing.

    With `log_tolerance`, numbers in the log may differ by this share.
    """
    names = [[p.name for p in list_checkpoints(r.checkpoints)] for r in (run, reference)]
    if names[0][-1:] != names[1][-1:]:
        return f"checkpoints {names[0]} instead of {names[1]}"
    newest = [load_checkpoint(list_checkpoints(r.checkpoints)[-1]) for r in (run, reference)]
    for contents in newest:
        for key in ("output_dir", "data"):
            contents["config"].pop(key)
    if where := _difference(newest[0], newest[1], "checkpoint"):
        return where
    logs = [
        [
            {k: v for k, v in line.items() if k != "timing"}
            for line in read_log(r.output / "log.jsonl")
        ]
        for r in (run, reference)
    ]
    if where := _difference(logs[0], logs[1], "log", log_tolerance):
        return where
    left = [p.name for p in run.output.rglob("*.part")]
    return f"left behind: {left}" if left else ""


def same_test(run: Run, reference: Run) -> str:
    """In what the results of two tests differ; empty if in nothing."""
    results = [
        {k: v for k, v in r.results().items() if k not in ("timing", "checkpoint", "config")}
        for r in (run, reference)
    ]
    return _difference(results[0], results[1], "results") or _difference(
        run.scores(), reference.scores(), "scores"
    )


def children(pid: int) -> list[int]:
    """Child processes of a process."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def _difference(a: Any, b: Any, where: str, tolerance: float = 0.0) -> str:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if torch.equal(a, b) and a.dtype == b.dtype else f"{where} differs"
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} instead of {type(b).__name__}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))} differ"
        return next(
            filter(None, (_difference(a[k], b[k], f"{where}.{k}", tolerance) for k in a)), ""
        )
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} instead of {len(b)} entries"
        pairs = enumerate(zip(a, b, strict=True))
        parts = (_difference(x, y, f"{where}[{i}]", tolerance) for i, (x, y) in pairs)
        return next(filter(None, parts), "")
    if isinstance(a, float) and math.isclose(a, b, rel_tol=tolerance):
        return ""
    return "" if a == b else f"{where}: {a!r} instead of {b!r}"
