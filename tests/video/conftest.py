"""A run that the tests of this folder share."""

from pathlib import Path

import pytest
import torch

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
