import json
from pathlib import Path

import pytest

from i3d_gn import cli
from i3d_gn.engine.typed_config import to_yaml
from i3d_gn.imagenet.config import load_imagenet_config
from i3d_gn.imagenet.tables import _by_epoch, read_image_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "imagenet"


def write_run(folder, config, errors, *overrides):
    folder.mkdir()
    loaded = load_imagenet_config(CONFIGS / f"{config}.yaml", (f"output_dir={folder}", *overrides))
    (folder / "config.yaml").write_text(to_yaml(loaded))
    lines = []
    for epoch, error in enumerate(errors, 1):
        for half in (1, 2):
            lines.append({"kind": "train", "step": 2 * epoch - 2 + half, "samples": 10 * half,
                          "top1": 30.0 * half})  # fmt: skip
        lines.append({"kind": "val", "step": 2 * epoch, "epoch": epoch, "error": error})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows(text, heading):
    lines = text.split(heading)[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_runs_appear_in_their_cells(tmp_path, capsys):
    def run(name, config, errors, *overrides):
        overrides = ("train.epochs=8", "train.milestones=[3]", *overrides)
        return str(write_run(tmp_path / name, config, errors, *overrides))

    flat = [90, 80, 70]
    runs = [
        run("a", "bn", [*flat, 31, 35, 33, 32, 34]),
        run("b", "bn", [*flat, 35, 35, 35, 35, 35], "seed=1"),
        run("c", "gn", [*flat, 24, 24, 24, 24, 24], "train.images_per_gpu=2"),
        run("d", "gn", [*flat, 26, 26, 26, 26, 26], "model.num_groups=4"),
        run("e", "in", [*flat, 28, 28, 28, 28, 28]),
        run("unfinished", "gn", flat),
        run("other", "resnet101_gn", [*flat, 1, 1, 1, 1, 1]),
    ]
    figure = tmp_path / "curves.png"
    assert cli.main(["table", *runs, "--curves", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert "of resnet50, median of the last epochs (5)" in printed
    header, _, paper, ours = rows(printed, "Table 1")
    assert header == ["", "BN", "LN", "IN", "GN"]
    assert paper == ["paper", "23.6", "25.3", "28.4", "24.1"]
    assert ours == ["ours", "34.0 (2)", "not run", "28.0", "not run"]
    table2 = rows(printed, "Table 2")
    assert table2[2] == ["BN, paper", "23.6", "23.7", "24.8", "27.3", "34.7"]
    assert table2[5] == ["GN, ours", "not run", "not run", "not run", "not run", "24.0"]
    groups = dict(zip(*rows(printed, "Table 3: number")[::3], strict=True))
    assert groups["4"] == "26.0"
    assert groups["32"] == "not run"
    channels = dict(zip(*rows(printed, "Table 3: channels")[::3], strict=True))
    assert channels["1"] == "28.0"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_training_error_of_an_epoch_is_weighted_by_images(tmp_path):
    run = read_image_run(write_run(tmp_path / "a", "bn", [50.0, 40.0]))
    assert run.train_errors == pytest.approx([50.0, 50.0])  # (10 x 30 + 20 x 60) / 30
    assert run.median_error is None


def test_folder_without_a_run_is_an_error(tmp_path, capsys):
    assert cli.main(["table", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("output_dir: runs/a\nclip: {num_frames: 8}\n")
    assert cli.main(["table", str(tmp_path)]) == 2
    assert "is not a run of i3d-gn train-imagenet: " in capsys.readouterr().err


def test_training_error_of_epochs_shorter_than_a_log_line():
    lines = [{"step": 5, "samples": 50, "top1": 20.0}, {"step": 8, "samples": 30, "top1": 60.0}]
    # Epochs of 2 steps: the third has one step of the first line and one of the second.
    assert _by_epoch(lines, [2, 4, 6, 8]) == pytest.approx([80, 80, 60, 40])
