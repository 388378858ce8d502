import json

import pytest
import torch

from i3d_gn.engine.checkpoint import CheckpointError
from i3d_gn.engine.distributed import Process
from i3d_gn.video import build
from i3d_gn.video.evaluate import video_scorer
from i3d_gn.video.load import load_network

pytest.importorskip("huggingface_hub")

from i3d_gn.video.hub import PretrainedClassifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(trained_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "network"
    PretrainedClassifier.from_checkpoint(trained_checkpoint).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_scores_of_a_saved_network_are_those_of_testing(folder, trained_checkpoint, trained_config):
    classifier = PretrainedClassifier.from_pretrained(str(folder))
    assert not classifier.training
    trained, config = load_network(trained_checkpoint, device=CPU)
    to_device = build.to_device(config, Process(0, 1, CPU), mean=trained.mean, std=trained.std)
    scorer = video_scorer(trained.model.eval(), config, to_device)
    index = build.load_index(trained_config.data.val_index, config)
    video = build.test_videos(index, config)[1]
    with torch.no_grad():
        scores = classifier(video.frames[video.clips]).mean(0)
    torch.testing.assert_close(scores.double(), scorer(video), rtol=1e-5, atol=1e-7)
    assert classifier.class_names == tuple(index.class_names)


def test_folder_says_what_the_network_is_and_not_where_it_was_trained(folder, trained_config):
    saved = json.loads((folder / "config.json").read_text())
    assert saved["settings"]["model"]["name"] == "i3d_tiny"
    assert saved["settings"]["clip"]["num_frames"] == 8
    assert saved["mean"] == [0.4, 0.5, 0.6]
    assert str(trained_config.output_dir) not in (folder / "config.json").read_text()
    assert (folder / "model.safetensors").stat().st_size > 1_000_000
    assert "i3d_gn" in (folder / "README.md").read_text()


def test_what_is_no_trained_network_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        PretrainedClassifier.from_checkpoint(tmp_path)
