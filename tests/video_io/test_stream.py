import numpy as np
import pytest

from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.decode import VideoDecodeError, decode_frames, probe_video
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.stream import open_stream


@pytest.fixture
def video(motion_set):
    return VideoIndex.load(motion_set.val_index).path_of(0)


@pytest.mark.parametrize("scaled", [False, True])
def test_streamed_frames_are_those_of_decode_frames(video, scaled):
    plan = CropPlan(40, 50, 2, 3, 32, 40) if scaled else None
    with open_stream(video, lambda height, width: plan) as stream:
        frames = list(stream.frames)
    info = probe_video(video)
    assert stream.fps == info.fps
    assert [frame.number for frame in frames] == list(range(info.num_frames))
    expected = decode_frames(video, range(info.num_frames), plan=plan)
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in frames]), expected)
    np.testing.assert_allclose(
        [frame.seconds for frame in frames], np.arange(info.num_frames) / info.fps, atol=1e-9
    )


def test_frames_that_are_not_wanted_have_no_pixels(video):
    with open_stream(video, lambda height, width: None, wanted=lambda i: i % 3 == 0) as stream:
        assert [f.number for f in stream.frames if f.pixels is not None] == [0, 3, 6, 9, 12, 15, 18]


def test_broken_video_is_an_error(video, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:500])
    with (
        pytest.raises(VideoDecodeError, match="cut.mp4"),
        open_stream(cut, lambda height, width: None) as stream,
    ):
        list(stream.frames)
