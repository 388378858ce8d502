import tracemalloc

import numpy as np
import pytest
import torch

from i3d_gn.data.transforms import evaluation_crops
from i3d_gn.data.windows import Extent, OneClip, SlidingWindows, TestView, sliding_windows
from i3d_gn.video_io.decode import decode_frames
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.stream import StreamedFrame

FPS = 10.0


def frames_of(number, size=1):
    for i in range(number):
        yield StreamedFrame(i, i / FPS, np.full((size, size, 3), i % 256, np.uint8))


def numbers(windows):
    return [[frame.number for frame in window.frames] for window in windows]


def in_frames(number, *, length, every, partial=False):
    return list(
        sliding_windows(
            frames_of(number), length=length, every=every, fps=FPS, in_seconds=False,
            partial=partial,
        )
    )  # fmt: skip


@pytest.mark.parametrize("number", [1, 3, 4, 5, 8, 9, 23])
@pytest.mark.parametrize(("length", "every"), [(4, 4), (4, 1), (4, 2), (2, 5), (1, 1)])
def test_windows_in_frames_are_all_that_fit(number, length, every):
    expected = [
        list(range(start, start + length)) for start in range(0, number - length + 1, every)
    ]
    if number < length:
        expected = [list(range(number))]
    assert numbers(in_frames(number, length=length, every=every)) == expected


def test_partial_window_is_the_first_that_reaches_the_end():
    assert numbers(in_frames(7, length=4, every=2, partial=True))[-1] == [4, 5, 6]
    assert numbers(in_frames(8, length=4, every=2, partial=True))[-1] == [4, 5, 6, 7]
    assert numbers(in_frames(3, length=4, every=2)) == [[0, 1, 2]]


def test_windows_in_seconds_follow_the_timestamps():
    times = [0.0, 0.1, 0.9, 1.0, 1.05, 3.5, 3.9, 4.2]
    frames = [StreamedFrame(i, t, None) for i, t in enumerate(times)]
    windows = list(
        sliding_windows(frames, length=1.0, every=1.0, fps=FPS, in_seconds=True, partial=True)
    )
    assert numbers(windows) == [[0, 1, 2], [3, 4], [5, 6], [7]]  # none from 2 to 3 seconds
    assert [window.start_seconds for window in windows] == [0, 1, 3, 4]
    assert windows[-1].end_seconds == pytest.approx(4.3)


def peak_bytes(number):
    tracemalloc.start()
    try:
        for _ in sliding_windows(
            frames_of(number, size=32), length=16, every=4, fps=FPS, in_seconds=False, partial=True
        ):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_video():
    assert peak_bytes(2000) < 1.2 * peak_bytes(100)


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_are_the_frames_of_the_windows(motion_set, workers):
    index = VideoIndex.load(motion_set.val_index)  # videos of 20 frames
    dataset = SlidingWindows(
        index, [0, 2, 3], length=Extent(8, False), every=Extent(3, False), partial=False,
        clips_of=OneClip(2), view=TestView(40, "center", 36), windows_per_part=2,
    )  # fmt: skip
    found = {}
    for part in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers):
        assert len(part.clips) <= 2
        assert len(part.frames) == part.clips.unique().numel()
        found.setdefault(part.video, []).extend(part.frames[part.clips].numpy())
    assert sorted(found) == [0, 2, 3]
    for video, windows in found.items():
        assert len(windows) == 5  # from 0, 3, 6, 9, 12
        for k, window in enumerate(windows):
            plan, _ = evaluation_crops(
                int(index.heights[video]), int(index.widths[video]),
                short_side=40, mode="center", crop_size=36,
            )  # fmt: skip
            expected = decode_frames(index.path_of(video), 3 * k + np.arange(0, 8, 2), plan=plan)
            np.testing.assert_array_equal(window, expected)


def test_video_shorter_than_a_window_loops(motion_set):
    index = VideoIndex.load(motion_set.val_index)
    dataset = SlidingWindows(
        index, [1], length=Extent(64, False), every=Extent(64, False), partial=False,
        clips_of=OneClip(3), view=TestView(40, "full", 36), windows_per_part=2,
    )  # fmt: skip
    (part,) = dataset
    expected = decode_frames(index.path_of(1), np.arange(0, 64, 3) % 20)
    assert part.clips.shape == (1, 22)
    assert part.is_last
    clip = part.frames[part.clips[0]]
    firsts = clip.float().mean(dim=(1, 2, 3)).numpy()
    assert np.corrcoef(firsts, expected.mean(axis=(1, 2, 3)))[0, 1] > 0.99
    np.testing.assert_array_equal(clip[0], clip[20])  # 60 is 0 again
    (still,) = SlidingWindows(
        index, [1], length=Extent(8, False), every=Extent(20, False), partial=False,
        clips_of=OneClip(0), view=TestView(40, "full", 36), windows_per_part=2,
    )  # fmt: skip
    assert still.clips.tolist() == [[0] * 8]  # stride 0 repeats a frame, as in training
    assert len(still.frames) == 1


def test_extent_in_seconds_depends_on_the_rate():
    assert Extent(2.5, True).frames(30.0) == 75
    assert Extent(16, False).frames(30.0) == 16
