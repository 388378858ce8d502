import numpy as np

from i3d_gn.video_io.strips import frame_strip


def frames(count, height=4, width=6):
    return np.stack([np.full((height, width, 3), i, dtype=np.uint8) for i in range(count)])


def test_frames_are_evenly_spaced_with_white_gaps():
    strip = frame_strip(frames(9), num_frames=3, max_height=10)
    assert strip.shape == (4, 3 * 6 + 2 * 2, 3)
    assert strip[0, :, 0].tolist() == [0] * 6 + [255] * 2 + [3] * 6 + [255] * 2 + [6] * 6


def test_short_clip_has_fewer_frames():
    assert frame_strip(frames(2), num_frames=8, max_height=10).shape[1] == 6 + 2 + 6


def test_tall_frames_are_scaled_down():
    strip = frame_strip(frames(4, 90, 160), num_frames=4, max_height=45)
    assert strip.shape == (45, 4 * 80 + 3 * 2, 3)
    assert strip[:, 82:162].tolist() == frames(2, 45, 80)[1].tolist()
