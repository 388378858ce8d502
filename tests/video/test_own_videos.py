"""Indexes as users have them: any number of classes, few videos, short ones."""

import pytest
import torch

from i3d_gn.engine.checkpoint import latest_checkpoint, load_checkpoint
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.run_log import read_log
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.video.evaluate import evaluate
from i3d_gn.video.train import train
from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index

PROCESS = Process(0, 1, torch.device("cpu"))
NO_LENGTH = ("model.num_classes=0", "train.steps=0", "train.milestones=[]")


@pytest.fixture
def subset(motion_set, tmp_path):
    """Writes an index of some videos of another one: with new labels, and frames counted anew."""

    def write(source, labels, names, num_frames=20):
        index = VideoIndex.load(getattr(motion_set, f"{source}_index"))
        records = [
            VideoRecord(
                path=index.paths[i], label=label, num_frames=num_frames, fps=25.0,
                duration_seconds=num_frames / 25, width=int(index.widths[i]),
                height=int(index.heights[i]),
            )
            for i, label in labels.items()
        ]  # fmt: skip
        path = tmp_path / f"{source}.parquet"
        write_index(path, records, class_names=names, root=index.root)
        return f"data.{source}_index={path}"

    return write


def test_classes_and_epochs_come_from_the_index(small_run, tmp_path):
    options = [*NO_LENGTH, "train.epochs=1", "train.validate_every_epochs=0.34"]
    train(small_run(*options), PROCESS)
    saved = load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert saved["step"] == 3  # 12 videos, 4 per step
    assert saved["model"]["head.linear.weight"].shape[0] == 6
    assert saved["config"]["model"]["num_classes"] == 6
    assert (saved["config"]["train"]["steps"], saved["config"]["train"]["epochs"]) == (3, None)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log if line["kind"] == "val"] == [1, 2, 3]
    # The same command has nothing left to do, and its result can be tested.
    train(small_run(*options), PROCESS)
    assert evaluate(small_run(*options), None, PROCESS)["num_videos"] == 6


def test_more_epochs_extend_a_finished_run(small_run, tmp_path):
    for epochs, step in ((1, 3), (2, 6)):
        train(small_run(*NO_LENGTH, f"train.epochs={epochs}"), PROCESS)
        assert latest_checkpoint(tmp_path / "run" / "checkpoints").stem == f"step_{step:08d}"


def test_classes_without_a_training_video_are_said(small_run, subset, caplog):
    names = ["a", "b", "c", "d"]
    indexes = [
        subset("train", {0: 0, 1: 2, 2: 0, 3: 2}, names),
        subset("val", {0: 0, 1: 1, 2: 1}, names),
    ]
    train(small_run(*indexes, "model.num_classes=0", "train.steps=1"), PROCESS)
    assert (
        "2 of 4 classes have no training video and cannot be learned, but 2 validation videos: b, d"
        in caplog.text
    )


def test_one_class_is_a_one_line_error(small_run, subset):
    indexes = [subset("train", {0: 0, 1: 0}, ["all"]), subset("val", {0: 0}, ["all"])]
    with pytest.raises(ConfigError, match="has one class, all; training needs at least two"):
        train(small_run(*indexes, "model.num_classes=0"), PROCESS)


def test_more_classes_in_validation_than_in_training_is_a_one_line_error(small_run, subset):
    indexes = [
        subset("train", {0: 0, 1: 1}, ["a", "b"]),
        subset("val", {0: 0, 1: 2}, ["a", "b", "c"]),
    ]
    with pytest.raises(ConfigError, match="different class ids .*only one .* has 'c'.*--label"):
        train(small_run(*indexes, "model.num_classes=0"), PROCESS)


@pytest.mark.parametrize("num_frames", [1, 3])
def test_videos_shorter_than_the_clip_are_trained_and_tested(
    small_run, subset, tmp_path, num_frames
):
    """A clip of 8 frames repeats the few there are, as `test_clips` shows."""
    indexes = [
        subset("train", {0: 0, 1: 1, 2: 0, 3: 1}, ["a", "b"], num_frames),
        subset("val", {0: 0, 1: 1}, ["a", "b"], num_frames),
    ]
    config = small_run(*indexes, "model.num_classes=0", "train.steps=2")
    train(config, PROCESS)
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [(line["samples"], line["broken"]) for line in lines] == [(8, 0), (2, 0)]
    results = evaluate(config, None, PROCESS)
    assert (results["num_videos"], results["skipped"]) == (2, {})
