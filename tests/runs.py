"""What tests of training runs share: results on disk, a stop in between, several ranks."""

import contextlib
import os
import subprocess
import sys

import pytest

from i3d_gn.engine.checkpoint import latest_checkpoint, load_checkpoint
from i3d_gn.engine.run_log import read_log
from i3d_gn.engine.trainer import Trainer
from i3d_gn.video_io.index import VideoRecord


def newest_checkpoint(run):
    """The contents of the newest checkpoint in the output_dir of a run."""
    return load_checkpoint(latest_checkpoint(run / "checkpoints"))


def log_without_timing(run):
    """The lines of a run's log, without what the clock decides."""
    return [
        {key: value for key, value in line.items() if key != "timing"}
        for line in read_log(run / "log.jsonl")
    ]


@contextlib.contextmanager
def interrupted_before(step):
    """Ctrl-C before the step with this number, counted from 0."""

    def interrupts(self, number, batches):
        if number == step:
            raise KeyboardInterrupt
        return take_step(self, number, batches)

    take_step = Trainer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupts)
        with pytest.raises(KeyboardInterrupt):
            yield


def on_ranks(world_size, *program):
    """Run a program (a script, or `-m` and a module) and its arguments with torchrun.

    It can import what a test can, wherever the script lies.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={world_size}", *map(str, program),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True)


def records_of(index):
    """Rows of `index`, to write another one of them."""
    return [
        VideoRecord(
            path=path, label=int(label), num_frames=int(frames), fps=25.0, duration_seconds=0.8,
            width=int(width), height=int(height),
        )
        for path, label, frames, width, height in zip(
            index.paths, index.labels, index.num_frames, index.widths, index.heights, strict=True
        )
    ]  # fmt: skip
