"""Index arithmetic against brute force and numbers worked out by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
from pytorchvideo.data.clip_sampling import ConstantClipsPerVideoSampler

from i3d_gn.data.clips import (
    clip_indices,
    clip_span,
    random_start,
    spaced_starts,
    union_of_clips,
)


@pytest.mark.parametrize(
    ("num_frames", "stride", "span"), [(32, 2, 63), (64, 1, 64), (8, 8, 57), (1, 5, 1), (16, 0, 1)]
)
def test_span_counts_first_to_last_frame(num_frames, stride, span):
    assert clip_span(num_frames, stride) == span


@pytest.mark.parametrize(("num_frames", "stride"), [(0, 2), (-1, 2), (4, -1)])
def test_span_rejects_invalid_clips(num_frames, stride):
    with pytest.raises(ValueError, match="must be at least"):
        clip_span(num_frames, stride)


def test_indices_loop_past_the_end():
    indices = clip_indices(3, num_frames=4, stride=2, video_length=5)
    assert indices.tolist() == [3, 0, 2, 4]
    assert indices.dtype == np.int64


def test_stride_zero_repeats_a_frame():
    assert clip_indices(7, num_frames=3, stride=0, video_length=9).tolist() == [7, 7, 7]


def test_indices_equal_walking_through_the_video():
    for video_length in (1, 2, 7, 63, 64, 300):
        for start in {0, video_length // 2, video_length - 1}:
            position, walked = start, []
            for _ in range(32):
                walked.append(position)
                for _ in range(2):
                    position = 0 if position + 1 == video_length else position + 1
            got = clip_indices(start, num_frames=32, stride=2, video_length=video_length)
            assert got.tolist() == walked


@pytest.mark.parametrize("start", [-1, 10])
def test_start_must_be_in_the_video(start):
    with pytest.raises(ValueError, match="must be in 0 ... 9"):
        clip_indices(start, num_frames=2, stride=1, video_length=10)


def test_random_start_is_uniform():
    rng = np.random.default_rng(0)
    starts = [random_start(12, num_frames=4, stride=2, rng=rng) for _ in range(6000)]
    counts = np.bincount(starts)
    assert len(counts) == 12 - 7 + 1
    # 5 degrees of freedom: 20.5 is exceeded once in a thousand seeds.
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5


@pytest.mark.parametrize("video_length", [1, 5, 62, 63])
def test_random_start_of_a_short_video_is_its_first_frame(video_length):
    rng = np.random.default_rng(0)
    assert {random_start(video_length, num_frames=32, stride=2, rng=rng) for _ in range(50)} == {0}


def test_starts_of_300_frames_in_32x2():
    clips = {"num_clips": 10, "num_frames": 32, "stride": 2}
    assert spaced_starts(300, spacing="nonlocal", **clips).tolist() == list(range(0, 300, 30))
    # room for 300 - 63 = 237 further starts
    uniform = [0, 26, 53, 79, 105, 132, 158, 184, 211, 237]
    assert spaced_starts(300, spacing="uniform", **clips).tolist() == uniform
    slowfast = [0, 23, 47, 71, 94, 118, 142, 165, 189, 213]
    assert spaced_starts(300, spacing="slowfast", **clips).tolist() == slowfast


@pytest.mark.parametrize("spacing", ["nonlocal", "uniform", "slowfast"])
def test_starts_follow_their_formula(spacing):
    for video_length in (1, 40, 63, 64, 97, 250, 108_000):
        for num_clips in (1, 2, 3, 10):
            room = max(0, video_length - 63)
            i = np.arange(num_clips)
            expected = {
                "nonlocal": np.floor(video_length * i / num_clips),
                "uniform": np.floor(i * room / max(1, num_clips - 1) + 0.5),
                "slowfast": np.floor(room * i / num_clips),
            }[spacing]
            got = spaced_starts(
                video_length, num_clips=num_clips, num_frames=32, stride=2, spacing=spacing
            )
            assert got.tolist() == expected.astype(int).tolist()
            assert 0 <= got.min() <= got.max() < video_length


@pytest.mark.parametrize("video_length", [40, 63, 64, 97, 250, 300, 108_000])
def test_slowfast_spacing_is_that_of_pytorchvideos_sampler(video_length):
    """Its times are in seconds: here a frame lasts one."""
    sampler = ConstantClipsPerVideoSampler(clip_duration=Fraction(63), clips_per_video=10)
    clips = [sampler(0.0, Fraction(video_length), {}) for _ in range(10)]
    got = spaced_starts(video_length, num_clips=10, num_frames=32, stride=2, spacing="slowfast")
    assert got.tolist() == [math.floor(clip.clip_start_sec) for clip in clips]


def test_unknown_spacing_lists_valid_ones():
    with pytest.raises(ValueError, match="nonlocal, uniform, slowfast"):
        spaced_starts(
            300,
            num_clips=10,
            num_frames=32,
            stride=2,
            spacing="even",  # pyright: ignore[reportArgumentType]
        )


def test_no_clips_is_an_error():
    with pytest.raises(ValueError, match="num_clips is 0"):
        spaced_starts(300, num_clips=0, num_frames=32, stride=2, spacing="uniform")


def test_union_restores_every_clip():
    starts = spaced_starts(100, num_clips=10, num_frames=32, stride=2, spacing="nonlocal")
    clips = np.stack(
        [clip_indices(int(s), num_frames=32, stride=2, video_length=100) for s in starts]
    )
    frames, inverse = union_of_clips(clips)
    assert frames.tolist() == sorted(set(clips.ravel().tolist()))
    assert np.array_equal(frames[inverse], clips)


@pytest.mark.parametrize("matrix", [np.zeros(3, int), np.zeros((2, 3))])
def test_union_rejects_other_input(matrix):
    with pytest.raises(ValueError, match="must hold integers"):
        union_of_clips(matrix)


def test_an_empty_video_has_no_clips():
    with pytest.raises(ValueError, match="video_length is 0"):
        random_start(0, num_frames=1, stride=1, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="video_length is 0"):
        spaced_starts(0, num_clips=1, num_frames=1, stride=1, spacing="nonlocal")
    with pytest.raises(ValueError, match="video_length is 0"):
        clip_indices(0, num_frames=1, stride=1, video_length=0)
