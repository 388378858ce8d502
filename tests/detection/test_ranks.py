"""A run on two ranks is that of one process."""

import json
from pathlib import Path

import torch

from i3d_gn.detection import build
from i3d_gn.detection.config import load_detection_config
from i3d_gn.detection.evaluate import evaluate_coco
from i3d_gn.detection.train import train_coco
from i3d_gn.engine.checkpoint import latest_checkpoint
from i3d_gn.engine.distributed import init_process_group
from i3d_gn.engine.typed_config import to_yaml
from tests.detection.conftest import with_few_detections
from tests.runs import log_without_timing, newest_checkpoint, on_ranks


def work_of_a_rank(folder):
    """Train as `folder`'s config says, and test the network that one process has trained."""
    build.build_model = with_few_detections
    trains, tests = (
        load_detection_config(folder / "config.yaml", (f"output_dir={folder / name}",))
        for name in ("two", "tested")
    )
    with init_process_group(timeout_minutes=2) as process:
        train_coco(trains, process)
        evaluate_coco(tests, process, latest_checkpoint(folder / "one" / "checkpoints"))


def test_two_ranks_train_and_test_exactly_like_one_process(small, tmp_path, fast_test, one_process):
    """Halving a sum of two gradients is exact, and group norm knows no batch."""
    options = ["train.steps=3", "train.milestones=[2]", "train.validate_every=3"]
    config = small(*options, output_dir=tmp_path / "one")
    train_coco(config, one_process)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from tests.detection.test_ranks import work_of_a_rank\n"
        "work_of_a_rank(Path(__file__).parent)\n"
    )
    done = on_ranks(2, program)
    assert done.returncode == 0, done.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    weights = newest_checkpoint(two)["model"]
    assert all(torch.equal(v, weights[k]) for k, v in newest_checkpoint(one)["model"].items())
    assert log_without_timing(one) == log_without_timing(two)
    records, *others = (
        json.loads((folder / "detections.json").read_text())
        for folder in (one, two, tmp_path / "tested")
    )
    # Two objects in each of the 8 images: none is tested twice.
    assert [record["image_id"] for record in records] == [i for i in range(1, 9) for _ in range(2)]
    assert others == [records, records]
    results = [json.loads((f / "results.json").read_text()) for f in (one, tmp_path / "tested")]
    checkpoint = latest_checkpoint(Path(config.output_dir, "checkpoints"))
    assert {**results[0], "checkpoint": str(checkpoint)} == results[1]
