"""A run that the tests of this folder share."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from i3d_gn.data import videos, windows, workers
from i3d_gn.engine.distributed import Process
from i3d_gn.video.config import Config, load_config
from i3d_gn.video.train import train
from tests.conftest import SMALL_RUN


@pytest.fixture(scope="session")
def trained_config(motion_set, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a network that was trained for two steps in its output_dir."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "config.yaml"
    path.write_text(
        f"output_dir: {folder / 'run'}\n"
        f"data: {{train_index: {motion_set.train_index}, val_index: {motion_set.val_index}, "
        f"num_workers: 0}}\n{SMALL_RUN}"
    )
    config = load_config(path, ["train.steps=2", "data.mean=[0.4,0.5,0.6]"])
    train(config, Process(0, 1, torch.device("cpu")))
    return config


@pytest.fixture(scope="session")
def trained_checkpoint(trained_config: Config) -> Path:
    """Its checkpoint, in the output_dir of the run."""
    return Path(trained_config.output_dir, "checkpoints", "step_00000002.pt")


@pytest.fixture
def break_decoder(monkeypatch: pytest.MonkeyPatch):
    """Makes decoders crash, or hang, over videos with a name; windows after some frames."""
    main, decode, open_stream = os.getpid(), videos.decode_frames, windows.open_stream

    def install(name: str, *, hang: bool = False, first_frame: int = 0) -> None:
        def break_over(path):
            assert os.getpid() != main, "decoded in the main process"
            if Path(path).name == name:
                time.sleep(1000) if hang else os.kill(os.getpid(), signal.SIGSEGV)

        def decode_or_break(path, *arguments, **options):
            break_over(path)
            return decode(path, *arguments, **options)

        @contextlib.contextmanager
        def stream_or_break(path, *arguments, **options):
            def frames(stream):
                for frame in stream.frames:
                    if frame.number == first_frame:
                        break_over(path)
                    yield frame

            with open_stream(path, *arguments, **options) as stream:
                yield stream._replace(frames=frames(stream))

        monkeypatch.setattr(videos, "decode_frames", decode_or_break)
        monkeypatch.setattr(windows, "open_stream", stream_or_break)
        monkeypatch.setattr(workers, "_POLL_SECONDS", 0.3)

    return install
