import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from i3d_gn.engine.checkpoint import CheckpointError, file_sha256, latest_checkpoint
from i3d_gn.engine.distributed import World
from i3d_gn.engine.typed_config import ConfigError, config_hash, to_yaml
from i3d_gn.video.evaluate import evaluate
from i3d_gn.video.train import train
from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index

WORLD = World(0, 1, torch.device("cpu"))


def test_results_say_how_they_came_about(small_run, tmp_path):
    config = small_run("train.steps=2")
    train(config, WORLD)
    evaluate(config, None, WORLD)
    (folder,) = (tmp_path / "run").glob("test_step_00000002_3xfull_nonlocal_*")
    results = json.loads((folder / "results.json").read_text())
    assert results["num_videos"] == 6
    assert (results["num_skipped"], results["skipped"]) == (0, {})
    assert (results["num_clips"], results["spacing"], results["spatial"]) == (3, "nonlocal", "full")
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert results["checkpoint_sha256"] == file_sha256(checkpoint)
    assert results["config_sha256"] == config_hash(config)
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    ranked = np.argsort(-np.array(table["scores"]), axis=1)
    labels = np.array(table["label"])
    assert results["top1"] == pytest.approx(100 * (ranked[:, 0] == labels).mean())
    assert results["top5"] == pytest.approx(100 * (ranked[:, :5] == labels[:, None]).any(1).mean())
    assert results["mean_class_accuracy"] == pytest.approx(results["top1"])  # a video a class
    assert results["timing"]["videos"] == 6
    assert 0 < results["timing"]["data_wait_share"] < 1


def test_tests_that_differ_keep_a_folder_each(small_run, tmp_path):
    train(small_run("train.steps=2"), WORLD)
    for override in ("test.average=softmax", "test.average=logits", "test.average=logits"):
        evaluate(small_run("train.steps=2", override), None, WORLD)
    found = sorted((tmp_path / "run").glob("test_*/results.json"))
    averages = [json.loads(path.read_text())["average"] for path in found]
    assert sorted(averages) == ["logits", "softmax"]


def records_of(index):
    return [
        VideoRecord(
            path=path,
            label=int(label),
            num_frames=int(frames),
            fps=25.0,
            duration_seconds=0.8,
            width=int(width),
            height=int(height),
        )
        for path, label, frames, width, height in zip(
            index.paths, index.labels, index.num_frames, index.widths, index.heights, strict=True
        )
    ]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_scores(small_run, motion_set, tmp_path):
    whole = VideoIndex.load(motion_set.val_index)
    five = tmp_path / "five.parquet"  # 3 + 2 videos for two processes, 2 + 2 + 1 for three
    write_index(five, records_of(whole)[:5], class_names=whole.class_names, root=whole.root)
    config = small_run("train.steps=2", f"data.val_index={five}")
    train(config, WORLD)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    tables, results = [], []
    for world_size in (1, 2, 3):
        subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={world_size}", "-m", "i3d_gn.video.evaluate", str(path),
            ],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        (folder,) = (tmp_path / "run").glob("test_step_00000002_3xfull_nonlocal_*")
        tables.append(pq.read_table(folder / "scores.parquet"))
        results.append(json.loads((folder / "results.json").read_text()))
    timing = [result.pop("timing") for result in results]
    assert [t["videos"] for t in timing] == [5, 3, 2]  # those of rank 0
    assert results[0] == results[1] == results[2]
    assert results[0]["num_videos"] == 5
    for table in tables[1:]:
        assert table["path"].equals(tables[0]["path"])
        np.testing.assert_allclose(
            np.array(table["scores"].to_pylist()),
            np.array(tables[0]["scores"].to_pylist()),
            rtol=1e-5,
        )


def test_normalisation_is_the_checkpoint_s(small_run, tmp_path):
    config = small_run("train.steps=2", "data.mean=[0.1,0.2,0.3]")
    train(config, WORLD)
    first = evaluate(config, None, WORLD)
    second = evaluate(small_run("train.steps=2"), None, WORLD)
    assert first is not None
    assert second is not None
    assert (first["top1"], first["top5"]) == (second["top1"], second["top5"])
    assert first["config_sha256"] != second["config_sha256"]


def test_what_does_not_fit_is_one_clear_line(small_run, tmp_path):
    config = small_run("train.steps=2")
    with pytest.raises(CheckpointError, match="no checkpoint under .*; train first"):
        evaluate(config, None, WORLD)
    train(config, WORLD)
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"another model than this config's: model.norm: gn -> bn"
    ):
        evaluate(small_run("model.norm=bn"), checkpoint, WORLD)
    with pytest.raises(
        ConfigError, match=r"train.parquet has 6 classes, model.num_classes is 7; set model.num_cla"
    ):
        train(small_run("model.num_classes=7", output_dir=tmp_path / "other"), WORLD)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        evaluate(config, tmp_path / "nowhere.pt", WORLD)


def test_a_checkpoint_of_other_classes_is_refused(small_run, motion_set, tmp_path):
    train(small_run("train.steps=2"), WORLD)
    index = VideoIndex.load(motion_set.val_index)
    names = index.class_names
    other = tmp_path / "other.parquet"
    swapped = (names[1], names[0], *names[2:])
    write_index(other, records_of(index), class_names=swapped, root=index.root)
    with pytest.raises(
        CheckpointError,
        match=f"other classes than those of .*other.parquet: class 0 is '{names[0]}' there and "
        f"'{names[1]}' here; .*--label-map",
    ):
        evaluate(small_run("train.steps=2", f"data.val_index={other}"), None, WORLD)


def test_indexes_that_number_classes_differently_are_refused(small_run, motion_set, tmp_path):
    index = VideoIndex.load(motion_set.val_index)
    other = tmp_path / "other.parquet"
    write_index(other, records_of(index), class_names=index.class_names[::-1], root=index.root)
    with pytest.raises(ConfigError, match="number their classes differently; .* --label-map"):
        train(small_run(f"data.val_index={other}"), WORLD)
