"""A small data set in COCO's format, and runs on it."""

import importlib.util
from pathlib import Path

import pytest

from i3d_gn.detection.build import build_model
from i3d_gn.detection.config import load_detection_config

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The folder that benchmarks/make_coco_shapes.py makes: 16 training, 8 validation images."""
    path = REPOSITORY / "benchmarks" / "make_coco_shapes.py"
    spec = importlib.util.spec_from_file_location("make_coco_shapes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("coco")
    module.make_coco_shapes(folder, num_train=16, num_val=8)
    return folder


@pytest.fixture
def small(shapes, tmp_path):
    """Makes the config of a run of seconds; arguments are overrides."""

    def make(*overrides, output_dir=tmp_path / "run", data=shapes):
        return load_detection_config(
            REPOSITORY / "configs" / "coco" / "shapes_tiny.yaml",
            (
                f"output_dir={output_dir}",
                *(
                    f"data.{split}_{what}={data / split}{suffix}"
                    for split in ("train", "val")
                    for what, suffix in (("images", ""), ("annotations", ".json"))
                ),
                "model.channels=16",
                "train.steps=4",
                "train.milestones=[3]",
                "train.warmup_steps=0",
                "train.log_every=1",
                "train.validate_every=4",
                "train.checkpoint_every=2",
                *overrides,
            ),
        )

    return make


def with_few_detections(config, device):
    """An untrained network detects something everywhere; two objects per image suffice."""
    network = build_model(config, device)
    network.roi_heads.detections_per_img = 2
    network.rpn._post_nms_top_n["testing"] = 10
    return network


@pytest.fixture
def fast_test(monkeypatch):
    """Tests of untrained networks find two objects per image."""
    monkeypatch.setattr("i3d_gn.detection.build.build_model", with_few_detections)
