import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from i3d_gn import cli
from i3d_gn.data.transforms import evaluation_crops, normalize_clips
from i3d_gn.engine.checkpoint import BEST, load_checkpoint, save_named
from i3d_gn.models.resnet2d import resnet_tiny
from i3d_gn.video.load import load_network
from i3d_gn.video_io.decode import decode_frames
from i3d_gn.video_io.index import VideoIndex


@pytest.fixture
def index(motion_set):
    return VideoIndex.load(motion_set.val_index)


def run(*arguments):
    return cli.main(["features", *map(str, arguments)])


def lines(out):
    return [json.loads(line) for line in (out / "videos.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("spatial", ["full", "three_crop"])
def test_features_are_those_of_each_clip_alone(trained_checkpoint, index, spatial, tmp_path):
    out = tmp_path / "out"
    arguments = ["--length", "14", "--every", "3", "--set", f"test.spatial={spatial}"]
    assert run(index.index_path, out, "--checkpoint", trained_checkpoint, *arguments) == 0
    network, _ = load_network(trained_checkpoint, device=torch.device("cpu"))
    model = network.model.eval()
    seen = {}
    model.head.linear.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    for video in (0, 4):
        found = np.load((out / index.paths[video]).with_suffix(".npy"))
        assert found.dtype == np.float32
        assert found.shape == (3, 512)  # windows from frames 0, 3 and 6 of 20
        plan, crops = evaluation_crops(
            int(index.heights[video]), int(index.widths[video]), short_side=40, mode=spatial,
            crop_size=None if spatial == "full" else 36,
        )  # fmt: skip
        for k, row in enumerate(found):
            frames = decode_frames(index.path_of(video), 3 * k + np.arange(0, 14, 2), plan=plan)
            rows = []
            for top, left, height, width in crops:
                crop = frames[:, top : top + height, left : left + width].copy()
                clip = torch.from_numpy(crop)[None].permute(0, 4, 1, 2, 3)
                with torch.no_grad():
                    model(normalize_clips(clip, network.mean, network.std))
                rows.append(seen["x"][0].numpy())
            np.testing.assert_allclose(row, np.mean(rows, axis=0), rtol=1e-4, atol=1e-5)
    status = index.path_of(0).stat()
    assert lines(out)[0] == {
        "file": index.paths[0].replace(".mp4", ".npy"), "video": str(index.path_of(0)),
        "bytes": status.st_size, "modified": status.st_mtime_ns, "windows": 3,
        "fps": lines(out)[0]["fps"], "length_frames": 14, "every_frames": 3,
    }  # fmt: skip


def test_features_resume_and_list_broken_videos(trained_checkpoint, index, tmp_path, capsys):
    folder, out = tmp_path / "videos", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for video, name in enumerate(["a.mp4", "sub/b.mp4", "c.mp4"]):
        shutil.copy(index.path_of(video), folder / name)
    content = (folder / "c.mp4").read_bytes()
    (folder / "c.mp4").write_bytes(content[:-300])
    command = [folder, out, "--checkpoint", trained_checkpoint, "--set", "data.num_workers=1"]
    assert run(*command) == 0
    captured = capsys.readouterr()
    assert "features of 2 videos" in captured.out
    assert "1 videos failed to decode" in captured.err
    assert not (out / "c.npy").exists()
    assert np.load(out / "a.npy").shape == (1, 512)  # of a training clip, 16 frames
    untouched = os.stat(out / "a.npy").st_mtime_ns
    (out / "sub" / "b.npy").unlink()
    with (out / "videos.jsonl").open("a") as file:
        file.write('{"file": "c.n')  # as a killed process leaves it
    (folder / "c.mp4").write_bytes(content)
    assert run(*command) == 0
    assert os.stat(out / "a.npy").st_mtime_ns == untouched
    assert (out / "sub" / "b.npy").is_file()
    assert (out / "c.npy").is_file()
    assert run(*command, "--every", "4") == 2
    assert f"error: {out} holds features with other settings (every)" in capsys.readouterr().err


def test_video_that_crashes_the_decoder_is_listed(
    trained_checkpoint, index, tmp_path, break_decoder, capsys
):
    for video in range(3):
        shutil.copy(index.path_of(video), tmp_path / f"{video}.mp4")
    settings = ["--checkpoint", trained_checkpoint, "--every", "4"]
    assert run(tmp_path, tmp_path / "whole", *settings) == 0
    break_decoder("1.mp4")
    out = tmp_path / "out"
    assert run(tmp_path, out, *settings) == 0
    captured = capsys.readouterr()
    assert "features of 2 videos" in captured.out
    assert re.search("1 videos failed to decode:\n .*1.mp4: a loader worker died", captured.err)
    assert {line["file"] for line in lines(out) if "error" in line} == {"1.npy"}
    for name in ("0.npy", "2.npy"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "1.npy").exists()


def test_weights_of_images_are_inflated(index, tmp_path):
    weights = tmp_path / "resnet.pt"
    torch.manual_seed(0)
    torch.save(resnet_tiny(num_classes=10).state_dict(), weights)
    settings = ["data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]", "test.short_side=224"]
    options = [option for setting in settings for option in ("--set", setting)]
    out = tmp_path / "out"
    video = index.path_of(0)
    assert run(video, out, "--weights", weights, *options, "--length", "0.8s") == 0
    assert np.load((out / video.name).with_suffix(".npy")).shape[1] == 512


def test_window_too_short_is_one_line_and_no_array(trained_checkpoint, index, tmp_path, capsys):
    command = [index.path_of(0), tmp_path / "out", "--checkpoint", trained_checkpoint]
    assert run(*command, "--length", "2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: a clip of 1 frames of .* is too small for this network; use at", error)
    assert not list(tmp_path.rglob("*.npy"))
    assert run(*command) == 0  # nothing was written with the other settings


def test_two_videos_with_one_output_are_refused(trained_checkpoint, index, tmp_path, capsys):
    for name in ("a.mp4", "a.mkv"):
        shutil.copy(index.path_of(0), tmp_path / name)
    assert run(tmp_path, tmp_path / "out", "--checkpoint", trained_checkpoint) == 2
    assert "a.mkv and a.mp4 would both be written to a.npy" in capsys.readouterr().err


def test_array_of_another_video_of_the_same_name_is_not_taken(
    trained_checkpoint, index, tmp_path, capsys
):
    out, network = tmp_path / "out", ["--checkpoint", trained_checkpoint]
    for video, folder in enumerate(("train", "val")):
        (tmp_path / folder).mkdir()
        shutil.copy(index.path_of(video), tmp_path / folder / "1.mp4")
    assert run(tmp_path / "train", out, *network) == 0
    first = np.load(out / "1.npy")
    assert run(tmp_path / "val", out, *network) == 2
    train, val = (tmp_path / folder / "1.mp4" for folder in ("train", "val"))
    line = f"error: {out}/1.npy holds the features of {train}, not of {val}; use another output"
    assert line in capsys.readouterr().err
    shutil.copytree(tmp_path / "train", tmp_path / "moved", copy_function=shutil.copy2)
    written = os.stat(out / "1.npy").st_mtime_ns
    assert run(tmp_path / "moved", out, *network) == 0
    assert os.stat(out / "1.npy").st_mtime_ns == written
    shutil.copy(val, train)  # replaced: its features are computed again
    assert run(tmp_path / "train", out, *network) == 0
    assert np.abs(np.load(out / "1.npy") - first).max() > 1e-3


def test_run_folder_with_another_checkpoint_is_another_network(
    trained_checkpoint, index, tmp_path, capsys
):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(trained_checkpoint, checkpoints / trained_checkpoint.name)
    command = [index.path_of(0), tmp_path / "out", "--checkpoint", tmp_path / "run"]
    assert run(*command) == 0
    assert run(*command) == 0
    saved = load_checkpoint(trained_checkpoint)
    saved["model"]["head.linear.bias"] += 1
    save_named(checkpoints, BEST, step=2, contents=saved)
    assert run(*command) == 2
    assert "holds features with other settings (network)" in capsys.readouterr().err


def test_output_that_is_a_file_is_one_line(trained_checkpoint, index, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert run(index.path_of(0), tmp_path / "out", "--checkpoint", trained_checkpoint) == 2
    assert f"error: the output folder {tmp_path}/out cannot be written" in capsys.readouterr().err
