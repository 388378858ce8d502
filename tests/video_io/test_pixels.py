"""Which source pixels are scaled for a window, and how frames are turned upright."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.decode import decode_frames
from i3d_gn.video_io.pixels import SourceWindow, source_window


@pytest.mark.parametrize(
    ("axis", "alignment", "expected"),
    [
        # The example in the docstring of the module: source edge 4 is 5 in the resized frame.
        ((400, 500, 8, 5), 1, SourceWindow(4, 12, 15, 3)),
        # Even edges and an even size: 0 and 16 are 0 and 20.
        ((400, 500, 8, 5), 2, SourceWindow(0, 16, 20, 8)),
        # 15 pixels from edge 20 to the end of the axis are odd: 4 more source pixels make 20.
        ((28, 35, 24, 11), 2, SourceWindow(16, 16, 20, 4, 4)),
        # Unchanged size: only the window, its margin and alignment.
        ((100, 100, 40, 10), 1, SourceWindow(38, 14, 14, 2)),
        ((100, 100, 40, 10), 2, SourceWindow(36, 18, 18, 4)),
        # Shrinking by 4 needs 4 times the support of the filter.
        ((400, 100, 40, 10), 1, SourceWindow(152, 56, 14, 2)),
        # The whole axis, in whatever size.
        ((101, 77, 0, 77), 1, SourceWindow(0, 101, 77, 0)),
    ],
)
def test_source_window(axis, alignment, expected):
    original, resized, start, size = axis
    window = source_window(original, resized, start, size, alignment=alignment, extend=True)
    assert window == expected


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("alignment", [1, 2, 4])
def test_source_windows_are_aligned_and_cover_the_filter(alignment, extend):
    rng = np.random.default_rng(alignment)
    num_extended = 0
    for _ in range(3000):
        original, resized = rng.integers(8, 500, 2).tolist()
        size = int(rng.integers(1, resized + 1))
        start = int(rng.integers(0, resized - size + 1))
        window = source_window(original, resized, start, size, alignment=alignment, extend=extend)
        scale = resized / original
        support = math.ceil(alignment * max(1.0, 1 / scale))
        end = window.start + window.size
        # The left edge: aligned, on a pixel of the resized frame, with room for the filter.
        assert window.start >= 0
        assert window.start % alignment == 0
        assert abs(window.start * scale - round(window.start * scale)) <= 0.05
        assert window.offset == start - round(window.start * scale) >= 0
        assert window.start <= max(0, start / scale - support)
        # The right edge: as far as the filter reaches, or the end of the axis.
        assert end - window.beyond <= original
        assert end >= min(original, (start + size) / scale + support)
        assert 0 <= window.beyond <= (min(64, window.size) if extend else 0)
        if window.beyond:
            num_extended += 1
            assert end - window.beyond == original
        assert window.offset + size <= window.scaled
        # The scale: exact up to 0.05 pixels, unless at the end of the axis.
        shift = abs(end * scale - round(window.start * scale) - window.scaled)
        if window.beyond or end < original:
            assert shift <= 0.05
            assert window.scaled % alignment == 0
        else:
            assert shift < 1e-6
    assert bool(num_extended) is (extend and alignment > 1)


@pytest.mark.parametrize("corner", [(40, 65), (0, 65), (40, 0), (0, 0)])
def test_edges_of_a_frame_are_repeated(corner, tmp_path, encode_video, decode_sequentially):
    """Windows that extend past the end of the frame do not darken its last rows and columns."""
    path = encode_video(
        tmp_path / "edge.mp4", height=80, width=100, num_frames=2, options={"qp": "5"}
    )
    plan = CropPlan(100, 125, *corner, 60, 60)
    frame = torch.from_numpy(decode_sequentially(path)[1:]).permute(0, 3, 1, 2)
    resized = tv.resize(frame, [100, 125], antialias=True)
    expected = tv.crop(resized, *corner, 60, 60).permute(0, 2, 3, 1).numpy().astype(np.float64)
    difference = np.abs(decode_frames(path, [1], plan=plan) - expected)[0].mean(-1)
    for edge in (difference[0], difference[-1], difference[:, 0], difference[:, -1]):
        assert edge.mean() < 2
    assert difference.max() < 12


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 1, -1, 1),  # 45 degrees
        (1, 0, 0, 0),
        (0, 0, 0, 1),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (1, 1, 0, 1),
        (1, 0, 1, 1),
        (1, 1, 1, 0),
        (0, 1, 1, 1),
    ],
)
def test_other_display_matrices_are_ignored(matrix, tmp_path, plain_video, decode_sequentially):
    """The matrix of the track header (ISO 14496-12, 8.3.2) is patched in the file."""
    data = bytearray(plain_video.read_bytes())
    identity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    at = data.find(identity, data.find(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    path = tmp_path / "matrix.mp4"
    path.write_bytes(data)
    assert np.array_equal(decode_frames(path, [3]), decode_sequentially(path)[[3]])
