import json
from pathlib import Path

import pytest
import torch

from i3d_gn import cli
from i3d_gn.detection.build import build_model
from i3d_gn.detection.config import load_detection_config
from i3d_gn.detection.tables import TABLES
from i3d_gn.engine.typed_config import to_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = {
    path.stem: path
    for path in sorted(REPOSITORY.glob("configs/coco/*.yaml"))
    if path.stem != "shapes_tiny"
}

# From [GN]: table, AP of boxes and of masks.
PAPER = {
    "c4_r50_bn": (4, 37.7, 32.8),
    "c4_r50_gn": (4, 38.8, 33.6),
    "fpn_r50_4conv1fc_bn": (5, 38.6, 34.2),
    "fpn_r50_4conv1fc_gn_head": (5, 39.5, 34.4),
    "fpn_r50_4conv1fc_gn": (5, 40.0, 34.8),
    "fpn_r50_bn": (6, 38.6, 34.5),
    "fpn_r50_gn": (6, 40.3, 35.7),
    "fpn_r50_gn_long": (6, 40.8, 36.1),
    "fpn_r101_bn": (6, 40.9, 36.4),
    "fpn_r101_gn": (6, 41.8, 36.8),
    "fpn_r101_gn_long": (6, 42.3, 37.2),
    "fpn_r50_gn_scratch": (7, 39.5, 35.2),
    "fpn_r101_gn_scratch": (7, 41.0, 36.4),
}


def test_every_row_of_the_paper_has_a_config():
    assert CONFIGS.keys() == PAPER.keys()
    assert sum(map(len, TABLES.values())) == len(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_config_is_that_of_the_paper(name):
    table, box, mask = PAPER[name]
    config = load_detection_config(CONFIGS[name])
    rows = [(t, r) for t, rows in TABLES.items() for r in rows if r.matches(config)]
    assert [(t[:7], r.paper) for t, r in rows] == [(f"Table {table}", (box, mask))]
    text = CONFIGS[name].read_text()
    assert f"# expected: {box} box AP, {mask} mask AP" in text
    assert f"train-coco configs/coco/{name}.yaml" in text
    assert f"runs/coco/{name}" in text
    assert f"`{name}.yaml` | {box} / {mask} |" in (REPOSITORY / "docs/reproduce.md").read_text()
    train, model = config.train, config.model
    # Detectron: lr 0.0025 per GPU with 2 images of a pyramid, 0.00125 with one image of C4.
    images = 1 if "c4" in name else 2
    assert (train.images_per_gpu, train.global_batch_size) == (images, 8 * images)
    assert train.lr == train.lr_batch_size / 800
    scratch_or_long = name.endswith(("scratch", "long"))
    steps = (360, 240, 320) if "c4" in name else (270, 210, 250) if scratch_or_long else None
    steps = steps or (180, 120, 160)
    assert (train.steps, *train.milestones) == tuple(1000 * n for n in steps)
    assert (train.warmup_steps, train.warmup_from) == (500, 1 / 3)
    assert (train.weight_decay, train.norm_weight_decay, train.nesterov) == (1e-4, 0, False)
    assert model.num_frozen == (0 if name.endswith("scratch") else 2)
    assert (config.data.min_size, config.data.max_size) == (800, 1333)


@pytest.mark.parametrize(
    ("name", "train", "test"), [("c4_r50_gn", 12_000, 6000), ("fpn_r50_gn", 2000, 1000)]
)
def test_proposals_are_those_of_detectron(name, train, test):
    with torch.device("meta"):
        network = build_model(load_detection_config(CONFIGS[name]), torch.device("meta"))
    assert (network.rpn.pre_nms_top_n(), network.rpn.post_nms_top_n()) == (train, 2000)
    network.eval()
    assert (network.rpn.pre_nms_top_n(), network.rpn.post_nms_top_n()) == (test, 1000)


def write_run(folder, name, results, *overrides):
    folder.mkdir()
    config = load_detection_config(CONFIGS[name], (f"output_dir={folder}", *overrides))
    (folder / "config.yaml").write_text(to_yaml(config))
    if results is not None:
        box, mask = results
        values = {"box_ap": box, "box_ap50": 60.0, "mask_ap": mask, "mask_ap50": 55.5}
        (folder / "results.json").write_text(json.dumps(values))
    return str(folder)


def test_runs_appear_in_their_rows(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "a", "fpn_r50_gn", (40.0, 35.0)),
        write_run(tmp_path / "b", "fpn_r50_gn", (41.0, 36.0), "seed=1"),
        write_run(tmp_path / "c", "c4_r50_bn", (37.5, 32.5)),
        write_run(tmp_path / "d", "fpn_r50_gn_scratch", None),
        write_run(tmp_path / "e", "fpn_r50_4conv1fc_gn_head", (39.0, 34.0)),
        write_run(tmp_path / "short", "fpn_r101_gn", (1.0, 2.0), "train.steps=170000"),
    ]
    assert cli.main(["table", "coco", *runs]) == 0
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    assert ["R50 GN", "40.3 / 35.7", "40.5 / 35.5 (2)"] in rows
    assert ["BN*", "37.7 / 32.8", "37.5 / 32.5"] in rows
    assert ["R50 GN", "39.5 / 35.2", "not run"] in rows
    assert ["BN*, GN in the box head", "39.5 / 34.4", "39.0 / 34.0"] in rows
    assert ["R101 GN", "41.8 / 36.8", "not run"] in rows
    assert ["short", "gn", "2", "1.0", "60.0", "2.0", "55.5"] in rows


def test_folder_without_a_run_is_an_error(tmp_path, capsys):
    assert cli.main(["table", "coco", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("output_dir: runs/a\nclip: {num_frames: 8}\n")
    assert cli.main(["table", "coco", str(tmp_path)]) == 2
    assert "is not a run of i3d-gn train-coco: " in capsys.readouterr().err
