import json
import re

import pytest
import torch

from i3d_gn import cli
from i3d_gn.detection.config import load_detection_config
from i3d_gn.detection.evaluate import evaluate_coco, evaluate_model
from i3d_gn.detection.train import LOSSES, DetectionTraining, train_coco
from i3d_gn.engine.checkpoint import CheckpointError, latest_checkpoint
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.typed_config import ConfigError, to_yaml
from i3d_gn.models.resnet2d import resnet_tiny
from tests.runs import interrupted_before, log_without_timing, newest_checkpoint

CPU = torch.device("cpu")
PROCESS = Process(0, 1, CPU)


def test_resume_is_bit_identical_and_results_are_written(small, tmp_path, fast_test):
    train_coco(small(output_dir=tmp_path / "whole"), PROCESS)
    with interrupted_before(3):
        train_coco(small(output_dir=tmp_path / "cut"), PROCESS)
    train_coco(small("data.num_workers=1", output_dir=tmp_path / "cut"), PROCESS)
    whole, cut = (newest_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 4
    assert all(torch.equal(v, cut["model"][k]) for k, v in whole["model"].items())
    log = log_without_timing(tmp_path / "whole")
    assert log == log_without_timing(tmp_path / "cut")
    first = log[0]
    assert first["samples"] == 2
    assert first["loss"] == pytest.approx(sum(first[name] for name in LOSSES))

    names = ("results.json", "detections.json")
    results, records = (json.loads((tmp_path / "whole" / n).read_text()) for n in names)
    assert results["num_images"] == 8
    assert results["box_ap"] == log[-1]["box_ap"]
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(small(output_dir=tmp_path / "again")))
    checkpoint = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert cli.main(["evaluate-coco", str(config), "--checkpoint", str(checkpoint)]) == 0
    assert json.loads((tmp_path / "again" / "detections.json").read_text()) == records
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["mask_ap"] == results["mask_ap"]


def test_each_image_is_tested_once_on_any_number_of_ranks(small, fast_test, monkeypatch):
    config = small()
    task = DetectionTraining(config, PROCESS)
    torch.manual_seed(0)
    network = task.build_model()
    _, whole = evaluate_model(network, task.val_images, config, PROCESS)
    monkeypatch.setattr("i3d_gn.detection.evaluate.gather_on_main", lambda mine, _: [mine])
    ranks = [Process(rank, 3, CPU) for rank in range(3)]
    parts = [evaluate_model(network, task.val_images, config, rank)[1] for rank in ranks]
    records = [record for part in parts for record in part]
    assert whole == sorted(records, key=lambda record: record["image_id"])
    assert len({record["image_id"] for record in whole}) == 8


def test_run_that_stops_early_writes_results(small, tmp_path, fast_test):
    options = ["train.validate_every=1", "train.best_metric=val/box_ap", "train.patience=1"]
    train_coco(small(*options), PROCESS)
    assert newest_checkpoint(tmp_path / "run")["step"] == 2  # of 4; AP is 0 after both steps
    assert json.loads((tmp_path / "run" / "results.json").read_text())["checkpoint"] == "step 2"


def test_changed_boxes_do_not_resume(small, tmp_path, fast_test, shapes):
    copy = tmp_path / "train.json"
    content = json.loads((shapes / "train.json").read_text())
    copy.write_text(json.dumps(content))
    config = small(f"data.train_annotations={copy}", "train.steps=1", "train.milestones=[]")
    train_coco(config, PROCESS)
    content["annotations"][0]["bbox"][0] += 1
    copy.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="data have changed .*training annotations: "):
        train_coco(config, PROCESS)


def test_bfloat16_has_a_finite_loss(small, fast_test):
    config = small("train.precision=bf16")
    task = DetectionTraining(config, PROCESS)
    network = task.build_model()
    loss = task.loss(network, next(iter(task.training_batches(0))))
    loss.backward()
    assert loss.isfinite()
    assert len(evaluate_model(network, task.val_images, config, PROCESS)[0]) == 12


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.compile=true", "train.compile is not for detectors"),
        ("model.num_frozen=1", "without model.weights nothing can be frozen"),
        ("model.norm=frozen_bn", "without model.weights nothing can be frozen"),
        ("model.name=mask_rcnn_c4", r"model\.fpn_norm is gn, but mask_rcnn_c4"),
        ("model.anchor_sizes=[8,16]", "the pyramid has 5 levels"),
        ("model.anchor_sizes=[]", "expected at least one"),
        ("model.num_frozen=6", "num_frozen is 6; it must be at most 5 for mask_rcnn_fpn"),
        ("model.box_head=2fc", r"box head 2fc has no\s+convolutions"),
        ("train.warmup_from=2", "warmup_from is 2.0; it must lie in"),
        ("train.best_metric=val/top1", "best_metric is 'val/top1'; it must be one of val/box_ap, "),
        ("train.patience=2", "train.patience needs train.best_metric, e.g. val/box_ap"),
        ("train.schedule=cosine", "train.milestones have no effect with train.schedule=cosine"),
        ("train.images_per_gpu=3", r"is not a multiple of train\.images_per_gpu 3"),
        ("train.clip_grad_norm=0", "train.clip_grad_norm is 0.0; it must be positive"),
        ("data.min_size=800", "max_size 64 is smaller than data.min_size"),
        ("model.norms=gn", "unknown key 'model.norms'; did you mean 'model.norm'"),
    ],
)
def test_wrong_config_is_a_one_line_error(small, override, line):
    with pytest.raises(ConfigError, match=line) as caught:
        small(override)
    assert "\n" not in str(caught.value)


def test_data_that_do_not_fit_are_one_line_errors(small, tmp_path, shapes):
    with pytest.raises(ConfigError, match=r"has 3 categories, but model\.num_classes is 80"):
        DetectionTraining(small("model.num_classes=80"), PROCESS)
    content = json.loads((shapes / "val.json").read_text())
    content["categories"][0]["name"] = "circle"
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="have different categories"):
        DetectionTraining(small(f"data.val_annotations={path}"), PROCESS)
    with pytest.raises(CheckpointError, match="no checkpoint under .*; train first"):
        evaluate_coco(small(), PROCESS, None)


def test_backbone_weights_are_loaded(small, tmp_path):
    weights = resnet_tiny("gn").state_dict()
    path = tmp_path / "tiny.pth"
    torch.save(weights, path)
    config = small(f"model.weights={path}", "model.num_frozen=2")
    task = DetectionTraining(config, PROCESS)
    network = task.build_model()
    task.load_weights(network)
    assert torch.equal(network.backbone.body.conv1.weight, weights["conv1.weight"])
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert all(re.match(r"backbone\.body\.(conv1|norm1|res2)\.", name) for name in frozen)
    with pytest.raises(ValueError, match="those of an image network"):
        evaluate_coco(config, PROCESS, path)


def test_command_line(small, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small()))
    assert cli.main(["train-coco", str(path), "--print-config", "train.lr=0.5"]) == 0
    path.write_text(capsys.readouterr().out)
    assert load_detection_config(path).train.lr == 0.5
