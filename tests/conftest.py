"""Fixtures shared by all tests."""

import gc
import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

# Without a GPU, Triton kernels run in its interpreter; Triton asks for this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from i3d_gn.engine.distributed import Process
from i3d_gn.video.config import Config, load_config

# Sums over several threads have no fixed order, and these tests compare runs to the bit.
torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real videos and weights that may lie beside the project."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data (../shared/data) is not beside the project")
    return folder


@pytest.fixture(scope="session")
def one_process() -> Process:
    """A single process on the CPU."""
    return Process(0, 1, torch.device("cpu"))


@pytest.fixture
def temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, where this process and its workers put their temporary files."""
    # Not below pytest's own: the name of a socket has at most 107 characters.
    folder = tempfile.TemporaryDirectory()
    monkeypatch.setattr(tempfile, "tempdir", folder.name)
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    # At the end of the process the folder is gone.
    monkeypatch.setattr(multiprocessing.util, "_remove_temp_dir", lambda *_: None)
    with folder:
        yield Path(folder.name)


@pytest.fixture
def no_children_yet() -> None:
    """Ends the loader workers that the traceback of an earlier test may still refer to."""
    if multiprocessing.active_children():
        gc.collect()
    assert not multiprocessing.active_children()


class MotionSet(NamedTuple):
    """A small set of real H.264 files and its indexes."""

    folder: Path
    train_index: Path
    val_index: Path


@pytest.fixture(scope="session")
def motion_set(tmp_path_factory: pytest.TempPathFactory) -> MotionSet:
    """Six classes of motion, 2 training and 1 validation clip of each, prepared by data_tools."""
    from data_tools import index_videos, make_motion_clips

    folder = tmp_path_factory.mktemp("motion")
    arguments = ["--train-clips", "2", "--val-clips", "1", "--num-frames", "20"]
    assert make_motion_clips.main([str(folder / "videos"), *arguments]) == 0
    train, val = folder / "train.parquet", folder / "val.parquet"
    assert index_videos.main([str(folder / "videos" / "train"), str(train)]) == 0
    labels = ["--label-map", str(train)]
    assert index_videos.main([str(folder / "videos" / "val"), str(val), *labels]) == 0
    return MotionSet(folder, train, val)


SMALL_RUN = """
model: {name: i3d_tiny, num_classes: 6, dropout: 0.5}
clip: {num_frames: 8, stride: 2, short_side_min: 40, short_side_max: 48, crop_size: 36}
train:
  steps: 6
  global_batch_size: 4
  clips_per_gpu: 2
  lr: 0.05
  lr_batch_size: 4
  milestones: [4]
  log_every: 2
  validate_every: 3
  checkpoint_every: 2
  precise_bn_iterations: 2
test: {num_clips: 3, short_side: 40, clips_per_forward: 2}
"""


@pytest.fixture
def small_run(motion_set: MotionSet, tmp_path: Path) -> Callable[..., Config]:
    """Makes the config of a run of seconds; arguments are overrides."""

    def make(*overrides: str, output_dir: Path = tmp_path / "run") -> Config:
        path = tmp_path / "small_run.yaml"
        path.write_text(
            f"output_dir: {output_dir}\n"
            f"data: {{train_index: {motion_set.train_index}, val_index: {motion_set.val_index}, "
            f"num_workers: 0}}\n{SMALL_RUN}"
        )
        return load_config(path, overrides)

    return make
