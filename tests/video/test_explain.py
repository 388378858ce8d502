from fractions import Fraction

import av
import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from i3d_gn import cli
from i3d_gn.models import i3d_tiny
from i3d_gn.video.config import config_of_values
from i3d_gn.video.draw import heat_overlay
from i3d_gn.video.explain import _heat, evidence_of, grad_cam
from i3d_gn.video.recognizer import Recognizer
from i3d_gn.video.trained import TrainedNetwork
from i3d_gn.video_io.decode import decode_frames, probe_video
from i3d_gn.video_io.h264 import X264Options, write_h264
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.video_files import VideoFiles

CPU = torch.device("cpu")


class ColorNetwork(nn.Module):
    """Knows three classes: how much red, how much blue there is, and one that is never seen."""

    stage_names = ("colors",)
    has_window = True

    def __init__(self):
        super().__init__()
        self.colors = nn.Conv3d(3, 3, 4, stride=4, bias=False)
        with torch.no_grad():
            self.colors.weight.zero_()
            for out, channel in ((0, 0), (1, 2)):
                self.colors.weight[out, channel] = 1 / 64
        self.classes = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.classes.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0])))

    def feature_size(self, *size):
        return tuple(side // 4 for side in size)

    def forward(self, clips, *, window=None):
        pooled = self.classes(self.colors(clips).mean(dim=(2, 3, 4)))
        return pooled if window is None else pooled[..., None, None, None]


NUM_FRAMES, SIDE = 32, 64
RED = (slice(8, 16), slice(0, 16), slice(48, 64))  # frames, rows, columns
BLUE = (slice(20, 28), slice(48, 64), slice(0, 16))


@pytest.fixture
def video(tmp_path):
    """Black; a red square in the upper right early on, a blue one in the lower left later."""
    pixels = np.zeros((NUM_FRAMES, SIDE, SIDE, 3), np.uint8)
    pixels[(*RED, 0)] = 255
    pixels[(*BLUE, 2)] = 255
    path = tmp_path / "colors.mp4"

    def frames():
        for i, row in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(row, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            yield frame

    options = X264Options(crf=1, gop=8, preset="ultrafast", tune=None)
    write_h264(path, frames(), frame_rate=Fraction(25), options=options)
    return path


@pytest.fixture
def recognizer(tmp_path):
    clip = {"num_frames": 8, "stride": 2, "crop_size": 64, "short_side_min": 64}
    config = config_of_values(
        {"clip": clip, "test": {"short_side": SIDE}, "model": {"num_classes": 3}}, tmp_path
    )
    names = ("red", "blue", "never")
    network = TrainedNetwork(ColorNetwork(), (0.0,) * 3, (1.0,) * 3, names, None, None)  # type: ignore[arg-type]
    return Recognizer(network, config, CPU)


@pytest.mark.parametrize(("target", "where"), [(0, RED), (1, BLUE)])
def test_evidence_lies_where_and_when_the_class_is(recognizer, video, target, where):
    evidence = evidence_of(recognizer, VideoFiles([str(video)]), target, "colors")
    assert evidence.num_frames == [16, 16]
    cam = torch.cat(evidence.maps).numpy()  # (4, 16, 16): 8 frames and 4 x 4 pixels per cell
    expected = np.zeros((NUM_FRAMES, SIDE, SIDE))
    expected[where] = 1
    expected = expected[::2].reshape(4, 4, 16, 4, 16, 4).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(
        cam / evidence.peak, expected / expected.max(), atol=0.08
    )  # chroma is subsampled


def test_grad_cam_is_class_activation_mapping_under_average_pooling():
    """Grad-CAM of the last stage is CAM (Zhou et al. 2016) with its weights over their size."""
    torch.manual_seed(0)
    model = i3d_tiny("bn", num_classes=5).eval()
    nn.init.normal_(model.head.linear.weight)
    clips = torch.randn(2, 3, 8, 40, 48)
    with torch.no_grad():
        maps = model.feature_map(clips)
        weights = model.head.linear.weight[3] / maps[0, 0].numel()
        expected = torch.einsum("c,ncthw->nthw", weights, maps).relu()
    found = grad_cam(model, clips, 3, "res5")
    assert found.max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert grad_cam(model, clips, 3, "res2").shape == (2, 2, 9, 11)
    with pytest.raises(ValueError, match=r"output of 'head' is not \(N, C, T, H, W\)"):
        grad_cam(model, clips, 3, "head")


def test_picture_and_video_are_written(trained_checkpoint, motion_set, tmp_path, capsys):
    index = VideoIndex.load(motion_set.val_index)
    path, out, render = index.path_of(2), tmp_path / "e.png", tmp_path / "e.mp4"
    command = ["explain", str(path), "--checkpoint", str(trained_checkpoint)]
    outputs = ["--out", str(out), "--render", str(render)]
    assert cli.main([*command, *outputs, "--class", index.class_names[4], "--stage", "res3"]) == 0
    assert f"{index.class_names[4]} (" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    source, written = probe_video(path), probe_video(render)
    assert (written.num_frames, written.height) == (source.num_frames, 40)
    assert written.fps == pytest.approx(source.fps)
    plain, covered = (decode_frames(p, [0, 19])[:, :40, :40] for p in (path, render))
    assert np.abs(covered[0].mean(axis=(0, 1)) - plain[0].mean(axis=(0, 1))).max() > 2


def test_video_that_crashes_the_decoder_is_one_line(
    trained_checkpoint, motion_set, tmp_path, break_decoder, capsys
):
    path = VideoIndex.load(motion_set.val_index).path_of(2)
    break_decoder(path.name)
    command = ["explain", str(path), "--checkpoint", str(trained_checkpoint)]
    assert cli.main([*command, "--out", str(tmp_path / "e.png")]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert line.startswith(f"error: {path}: a loader worker died (SIGSEGV)")
    assert not list(tmp_path.iterdir())


def test_heat_covers_pixels_in_proportion():
    pixels = np.full((1, 3, 3), 200, np.uint8)
    covered = heat_overlay(pixels, np.array([[0.0, 0.5, 1.0]], np.float32))
    assert covered[0, 0].tolist() == [200, 200, 200]
    hottest = np.array(mpl.colormaps["turbo"](1.0)[:3]) * 255
    np.testing.assert_allclose(covered[0, 2], 0.35 * 200 + 0.65 * hottest, atol=1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--class", "move_lef"], "no class 'move_lef'; similar ones are 'move_left'"),
        (
            ["--stage", "res9"],
            "the network has no module 'res9'; use one of res2, res3, res4, res5",
        ),
        (["--stage", "head"], "the output of 'head' is not (N, C, T, H, W); choose another module"),
        (["--render", "x.avi"], "x.avi: its name must end in .mp4"),
        (["--out", "x.gif"], "x.gif: its name must end in .png, .pdf, .svg"),
    ],
)
def test_bad_input_is_one_line_and_no_file(
    trained_checkpoint, motion_set, arguments, line, tmp_path, capsys
):
    video = str(VideoIndex.load(motion_set.val_index).path_of(0))
    command = ["explain", video, "--checkpoint", str(trained_checkpoint)]
    assert cli.main([*command, "--out", str(tmp_path / "e.png"), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
    assert not list(tmp_path.rglob("*"))


def test_no_evidence_is_said(recognizer, video):
    assert evidence_of(recognizer, VideoFiles([str(video)]), 2, "colors").peak == 0


def test_evidence_in_repetitions_of_a_short_window_counts():
    """8 positions of 3 frames: 0 1 2 0 1 2 0 1; only the sixth and the seventh have evidence."""
    cam = torch.zeros(8, 1, 1)
    cam[5], cam[6] = 0.5, 1.0
    heat = _heat(cam, 8, (3, 2, 2, 3))
    assert heat.shape == (3, 2, 2)
    assert heat[:, 0, 0].tolist() == [1.0, 0.0, 0.5]
    whole = _heat(cam, 8, (8, 2, 2, 3))
    assert whole[:, 1, 1].tolist() == cam.flatten().tolist()
