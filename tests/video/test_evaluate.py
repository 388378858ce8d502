import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from i3d_gn import cli
from i3d_gn.engine.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.typed_config import ConfigError, config_hash, to_dict, to_yaml
from i3d_gn.files import file_sha256
from i3d_gn.models.resnet2d import resnet_tiny
from i3d_gn.video.evaluate import evaluate
from i3d_gn.video.train import train
from i3d_gn.video_io.index import VideoIndex, write_index
from tests.runs import on_ranks, records_of

PROCESS = Process(0, 1, torch.device("cpu"))


def test_results_record_settings_and_hashes(small_run, tmp_path):
    config = small_run("train.steps=2")
    train(config, PROCESS)
    evaluate(config, None, PROCESS)
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
    assert results["mean_class_accuracy"] == pytest.approx(results["top1"])  # one video per class
    assert results["timing"]["videos"] == 6
    assert 0 < results["timing"]["data_wait_share"] < 1


def test_different_tests_write_to_different_folders(small_run, motion_set, tmp_path):
    train(small_run("train.steps=2"), PROCESS)
    for override in ("test.average=softmax", "test.average=logits", "test.average=logits"):
        evaluate(small_run("train.steps=2", override), None, PROCESS)
    index = VideoIndex.load(motion_set.val_index)  # of the same videos, then of some
    five = tmp_path / "val.parquet"
    write_index(five, records_of(index)[:5], class_names=index.class_names, root=index.root)
    evaluate(small_run("train.steps=2", f"data.val_index={five}"), None, PROCESS)
    found = sorted((tmp_path / "run").glob("test_*/results.json"))
    results = [json.loads(path.read_text()) for path in found]
    assert sorted((r["average"], r["num_videos"]) for r in results) == [
        ("logits", 6), ("softmax", 5), ("softmax", 6),
    ]  # fmt: skip


def test_damaged_newest_checkpoint_is_refused(small_run, tmp_path):
    """Training falls back to the one before; a test would be of another network than said."""
    config = small_run("train.steps=2", "train.checkpoint_every=1", "train.precise_bn_iterations=1")
    train(config, PROCESS)
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match="step_00000002.pt"):
        evaluate(config, None, PROCESS)
    assert not list((tmp_path / "run").glob("test_*"))


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_ranks(small_run, motion_set, tmp_path):
    whole = VideoIndex.load(motion_set.val_index)
    five = tmp_path / "five.parquet"  # 3 + 2 videos on two ranks, 2 + 2 + 1 on three
    write_index(five, records_of(whole)[:5], class_names=whole.class_names, root=whole.root)
    config = small_run("train.steps=2", f"data.val_index={five}")
    train(config, PROCESS)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    tables, results = [], []
    for world_size in (1, 2, 3):
        on_ranks(world_size, "-m", "i3d_gn", "evaluate", path).check_returncode()
        (folder,) = (tmp_path / "run").glob("test_step_00000002_3xfull_nonlocal_*")
        tables.append(pq.read_table(folder / "scores.parquet"))
        results.append(json.loads((folder / "results.json").read_text()))
    timing = [result.pop("timing") for result in results]
    assert [t["videos"] for t in timing] == [5, 3, 2]  # of rank 0
    assert results[0] == results[1] == results[2]
    assert results[0]["num_videos"] == 5
    for table in tables[1:]:
        assert table["path"].equals(tables[0]["path"])
        np.testing.assert_allclose(
            np.array(table["scores"].to_pylist()),
            np.array(tables[0]["scores"].to_pylist()),
            rtol=1e-5,
        )


def test_mean_and_std_are_those_of_the_checkpoint(small_run, tmp_path):
    def scores(*overrides):
        config = small_run("train.steps=2", *overrides)
        results = evaluate(config, None, PROCESS)
        tested = [p for p in (tmp_path / "run").glob("test_*") if (p / "results.json").is_file()]
        (folder,) = [p for p in tested if config_hash(config) in (p / "results.json").read_text()]
        return results, np.array(pq.read_table(folder / "scores.parquet")["scores"].to_pylist())

    trained = "data.mean=[0.1,0.2,0.3]"
    train(small_run("train.steps=2", trained), PROCESS)
    (first, as_trained), (second, as_default) = scores(trained), scores()
    assert first["config_sha256"] != second["config_sha256"]
    np.testing.assert_array_equal(as_trained, as_default)
    # Scores do depend on the mean that the checkpoint holds.
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000002.pt")
    saved["input"]["mean"] = [0.9, 0.9, 0.9]
    torch.save(saved, tmp_path / "run" / "checkpoints" / "step_00000002.pt")
    _, other = scores("test.num_clips=3", "seed=1")
    assert np.abs(other - as_trained).max() > 1e-3
    with pytest.raises(
        CheckpointError, match=r"with mean \[0.9, 0.9, 0.9\], but data.mean is \[0.1"
    ):
        scores(trained)


def test_mismatches_are_one_line_errors(small_run, tmp_path):
    config = small_run("train.steps=2")
    with pytest.raises(CheckpointError, match="no checkpoint under .*; train first"):
        evaluate(config, None, PROCESS)
    train(config, PROCESS)
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"another model than this config's: model.norm: gn -> bn"
    ):
        evaluate(small_run("model.norm=bn"), checkpoint, PROCESS)
    with pytest.raises(
        ConfigError,
        match=r"train.parquet has 6 classes, but model.num_classes is 7; set model.num_cla",
    ):
        train(small_run("model.num_classes=7", output_dir=tmp_path / "other"), PROCESS)
    with pytest.raises(CheckpointError, match="checkpoint not found"):
        evaluate(config, tmp_path / "nowhere.pt", PROCESS)


def test_checkpoint_of_other_classes_is_refused(small_run, motion_set, tmp_path):
    train(small_run("train.steps=2"), PROCESS)
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
        evaluate(small_run("train.steps=2", f"data.val_index={other}"), None, PROCESS)


def test_indexes_with_different_class_ids_are_refused(small_run, motion_set, tmp_path):
    index = VideoIndex.load(motion_set.val_index)
    other = tmp_path / "other.parquet"
    write_index(other, records_of(index), class_names=index.class_names[::-1], root=index.root)
    with pytest.raises(ConfigError, match="have different class ids; .* --label-map"):
        train(small_run(f"data.val_index={other}"), PROCESS)


def test_results_have_the_config_that_trained_the_checkpoint(small_run, caplog):
    train(small_run("train.steps=2", "train.lr=0.01", "seed=3"), PROCESS)
    results = evaluate(small_run("train.steps=5", "clip.stride=1"), None, PROCESS)
    assert (results["config"]["train"]["steps"], results["config"]["train"]["lr"]) == (2, 0.01)
    assert results["config"]["seed"] == 3
    assert results["config"]["clip"]["stride"] == results["stride"] == 1
    assert "was trained with other clips: clip.stride: 2 -> 1" in caplog.text


def test_converted_weights_are_tested_like_their_checkpoint(small_run, tmp_path):
    config = small_run("train.steps=2", "data.mean=[0.1,0.2,0.3]")
    train(config, PROCESS)
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    converted = tmp_path / "converted.safetensors"
    assert cli.main(["convert", str(checkpoint), str(converted)]) == 0
    default = small_run("train.steps=2")
    expected, results = (
        evaluate(default, checkpoint, PROCESS),
        evaluate(default, converted, PROCESS),
    )
    assert results["step"] is None
    assert results["top1"] == expected["top1"]
    tables = [
        pq.read_table(next((tmp_path / "run").glob(f"test_{stem}_*")) / "scores.parquet")
        for stem in ("step_00000002", "converted")
    ]
    assert tables[0].equals(tables[1])
    with pytest.raises(ValueError, match="num_groups"):
        evaluate(small_run("model.num_groups=4"), converted, PROCESS)


def test_weights_without_a_head_are_not_tested(small_run, tmp_path):
    torch.save(resnet_tiny("gn", 10).state_dict(), tmp_path / "image.pth")
    with pytest.raises(CheckpointError, match="it has no head.linear.weight"):
        evaluate(small_run(), tmp_path / "image.pth", PROCESS)


def unlabeled_index(index, path, labels):
    records = [
        dataclasses.replace(record, label=label)
        for record, label in zip(records_of(index), labels, strict=True)
    ]
    write_index(path, records, class_names=index.class_names, root=index.root)
    return f"data.val_index={path}"


def test_unlabeled_videos_are_scored_and_do_not_count(small_run, motion_set, tmp_path, capsys):
    train(small_run("train.steps=2"), PROCESS)
    index = VideoIndex.load(motion_set.val_index)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002.pt"
    override = unlabeled_index(index, tmp_path / "none.parquet", [-1] * 6)
    results = evaluate(small_run("train.steps=2", override), checkpoint, PROCESS)
    assert (results["num_unlabeled"], "top1" in results) == (6, False)
    assert "6 videos without a label: scores only" in capsys.readouterr().out
    override = unlabeled_index(index, tmp_path / "some.parquet", [0, -1, -1, -1, -1, 5])
    results = evaluate(small_run("train.steps=2", override), checkpoint, PROCESS)
    assert (results["num_unlabeled"], results["num_videos"]) == (4, 2)
    with pytest.raises(ConfigError, match="6 videos have no label, which training and validation"):
        train(small_run(f"data.val_index={tmp_path / 'none.parquet'}"), PROCESS)


def test_checkpoint_of_another_task_is_refused(small_run, tmp_path):
    train(small_run("train.steps=2"), PROCESS)
    path = tmp_path / "run" / "checkpoints" / "step_00000002.pt"
    saved = load_checkpoint(path)
    saved["config"] = {"rows": 5}
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="not of a video network"):
        evaluate(small_run("train.steps=2"), path, PROCESS)
    saved["config"] = to_dict(small_run("train.steps=2"))
    saved["input"] = {"mean": "none"}
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="damaged: its mean is 'none'"):
        evaluate(small_run("train.steps=2"), path, PROCESS)
