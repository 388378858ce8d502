import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from i3d_gn import cli
from i3d_gn.engine.checkpoint import latest_checkpoint
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.run_log import read_log
from i3d_gn.engine.typed_config import ConfigError, to_yaml
from i3d_gn.imagenet.build import build_model
from i3d_gn.imagenet.config import load_imagenet_config
from i3d_gn.imagenet.train import train_imagenet
from i3d_gn.models import i3d_tiny
from i3d_gn.models.inflate import load_imagenet_weights
from i3d_gn.models.resnet2d import resnet_tiny
from i3d_gn.norm import SplitBatchNorm
from tests.runs import interrupted_before, log_without_timing, newest_checkpoint, on_ranks

CPU = torch.device("cpu")
PROCESS = Process(0, 1, CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, reddish and bluish noise: 18 images to train on, 8 to validate."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 160, (44, 40, 3))
                pixels[..., channel] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def small(folder, tmp_path):
    """Makes the config of a run of seconds; arguments are overrides."""

    def make(*overrides, output_dir=tmp_path / "run"):
        path = tmp_path / "small.yaml"
        path.write_text(f"""
output_dir: {output_dir}
model: {{name: resnet_tiny, num_classes: 2, norm: bn}}
data: {{train_folder: {folder}/train, val_folder: {folder}/val, num_workers: 0, crop_size: 32,
        val_short_side: 36}}
train: {{epochs: 3, images_per_gpu: 2, num_gpus: 4, lr: 1.0, lr_batch_size: 256, milestones: [2],
         log_every: 1}}
""")
        return load_imagenet_config(path, overrides)

    return make


def test_run_learns_and_reports_the_median_error(small, tmp_path, capsys):
    # Group norm learns this with any seed; batch norm over two images does not.
    config = small("model.norm=gn", "train.epochs=8", "train.milestones=[6]")
    train_imagenet(config, PROCESS)
    log = read_log(tmp_path / "run" / "log.jsonl")
    train_lines = [line for line in log if line["kind"] == "train"]
    val_lines = [line for line in log if line["kind"] == "val"]
    assert [line["epoch"] for line in val_lines] == list(range(1, 9))
    assert [line["samples"] for line in val_lines] == [8] * 8
    # 18 images are 2 batches of 8; the lr for 8 images is 1/32 of that for 256.
    assert [line["lr"] for line in train_lines] == pytest.approx([1 / 32] * 12 + [1 / 320] * 4)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["median_error"] == np.median([line["error"] for line in val_lines[-2:]])
    assert results["median_error"] < 20
    assert "median of the last 2" in capsys.readouterr().out


@pytest.mark.parametrize("norm", ["bn", "gn", "brn"])
def test_resume_is_bit_identical(small, tmp_path, norm):
    options = [f"model.norm={norm}"]
    train_imagenet(small(*options, output_dir=tmp_path / "whole"), PROCESS)
    with interrupted_before(3):
        train_imagenet(small(*options, output_dir=tmp_path / "cut"), PROCESS)
    train_imagenet(small(*options, "data.num_workers=2", output_dir=tmp_path / "cut"), PROCESS)
    whole, cut = newest_checkpoint(tmp_path / "whole"), newest_checkpoint(tmp_path / "cut")
    assert whole["step"] == cut["step"] == 6
    assert all(torch.equal(v, cut["model"][k]) for k, v in whole["model"].items())
    assert log_without_timing(tmp_path / "whole") == log_without_timing(tmp_path / "cut")


@pytest.mark.slow
def test_any_number_of_ranks_is_the_same_experiment(small, tmp_path):
    # Two values per channel in the last stage: rounding errors grow tenfold with every step.
    short = ["train.epochs=1", "train.milestones=[]"]
    config = small(*short, output_dir=tmp_path / "one")
    train_imagenet(config, PROCESS)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    four = f"output_dir={tmp_path / 'four'}"
    on_ranks(4, "-m", "i3d_gn", "train-imagenet", path, four).check_returncode()
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "four")]
    for one_line, four_line in zip(*logs, strict=True):
        # Validation uses the running statistics of worker 0 on every rank.
        tolerance = 1e-5 if one_line["kind"] == "train" else 1e-4
        assert four_line["loss"] == pytest.approx(one_line["loss"], rel=tolerance)
    one, four = (
        newest_checkpoint(tmp_path / "one")["model"],
        newest_checkpoint(tmp_path / "four")["model"],
    )
    for key, value in one.items():
        torch.testing.assert_close(four[key], value, rtol=1e-3, atol=1e-4, msg=key)
    # Statistics over all eight images at once are another experiment.
    train_imagenet(
        small(*short, "train.images_per_gpu=8", "train.num_gpus=1", output_dir=tmp_path / "whole"),
        PROCESS,
    )
    whole = newest_checkpoint(tmp_path / "whole")["model"]
    assert (whole["norm1.running_var"] - one["norm1.running_var"]).abs().max() > 1e-3


def test_checkpoint_inflates_to_a_video_network(small, tmp_path):
    train_imagenet(small("model.norm=gn", "train.epochs=1", "train.milestones=[]"), PROCESS)
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    video = i3d_tiny("gn", 5)
    report = load_imagenet_weights(video, checkpoint)
    assert report.left_at_init == ("head.linear.weight", "head.linear.bias")
    info = report.info
    assert (info.norm, info.num_groups, info.mean) == ("gn", 8, (0.485, 0.456, 0.406))
    kernel = newest_checkpoint(tmp_path / "run")["model"]["res3.0.conv1.weight"]
    torch.testing.assert_close(video.res3[0].conv1.weight.sum(2), kernel)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], {"SplitBatchNorm": 17}),
        (["model.norm=gn"], {"GroupNorm": 17}),
        (["model.norm=brn", "model.r_max=1.5", "model.d_max=0.5"], {"BatchRenorm": 17}),
        (["model.norm=none", "model.kernel_norm=weight_norm"], {"_WeightNorm": 17}),
        (
            ["model.norm=gn", "model.kernel_norm=weight_standardization"],
            {"GroupNorm": 17, "WeightStandardization": 17},
        ),
    ],
)
def test_norms_by_name(small, options, wanted):
    model = build_model(small(*options), CPU)
    kinds = [type(module).__name__ for module in model.modules()]
    assert {kind: kinds.count(kind) for kind in wanted} == wanted
    images = torch.randn(4, 3, 32, 32)
    assert model(images).shape == (4, 2)


def test_batch_norm_uses_the_images_per_gpu(small):
    model = build_model(small(), CPU)
    layers = [m for m in model.modules() if isinstance(m, SplitBatchNorm)]
    assert {layer.stats_batch_size for layer in layers} == {2}
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in resnet_tiny("bn", 2).parameters()
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.images_per_forward=0", "train.images_per_forward is 0; it must be at least 1"),
        ("train.lr=-1", "train.lr is -1.0; it must not be negative"),
        ("train.momentum=1.5", "train.momentum is 1.5; it must lie in"),
        ("data.num_workers=-2", "data.num_workers is -2; it must not be negative"),
        ("model.d_max=-1", "model.d_max is -1.0; it must not be negative"),
        ("train.images_per_forward=3", r"images_per_forward is 3.*multiple.*images_per_gpu 2"),
        ("train.epoch=3", r"unknown key 'train\.epoch'; did you mean 'train\.epochs'"),
        ("data.area_min=0", "area_min is 0"),
        ("data.val_short_side=20", "smaller than data.crop_size"),
        ("model.norm=sync_bn", "norm"),
        ("train.milestones=[3,2]", "must increase"),
    ],
)
def test_wrong_config_is_a_one_line_error(small, override, line):
    with pytest.raises(ConfigError, match=line):
        small(override)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_a_one_line_error(small, folder, tmp_path, workers):
    broken = tmp_path / "val"
    shutil.copytree(folder / "val", broken)
    image = broken / "red" / "2.png"
    image.write_bytes(image.read_bytes()[:200])
    options = ["train.epochs=1", "train.milestones=[]", f"data.num_workers={workers}"]
    with pytest.raises(ValueError, match=r"2\.png: cannot be read as an image .*replace") as caught:
        train_imagenet(small(f"data.val_folder={broken}", *options), PROCESS)
    assert "\n" not in str(caught.value)


def test_wrong_data_are_one_line_errors(small, folder, tmp_path):
    with pytest.raises(ValueError, match=r"has 2 classes, but model\.num_classes is 10"):
        train_imagenet(small("model.num_classes=10"), PROCESS)
    with pytest.raises(ValueError, match="18 images are fewer than one batch of 128"):
        train_imagenet(small("train.images_per_gpu=32"), PROCESS)
    val = tmp_path / "val"
    shutil.copytree(folder / "val", val)
    (val / "blue").rename(val / "green")
    with pytest.raises(ValueError, match="different classes: only one of them has 'blue'"):
        train_imagenet(small(f"data.val_folder={val}"), PROCESS)
    with pytest.raises(ValueError, match=r"3 ranks cannot share.*num_gpus=4"):
        train_imagenet(small(), Process(0, 3, torch.device("cpu")))


def test_command_line(small, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small()))
    assert cli.main(["train-imagenet", str(path), "--print-config", "train.lr=0.5"]) == 0
    path.write_text(capsys.readouterr().out)
    assert load_imagenet_config(path).train.lr == 0.5
