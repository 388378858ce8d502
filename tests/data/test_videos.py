import dataclasses

import numpy as np
import pytest
import torch

from i3d_gn.data import videos
from i3d_gn.data.batches import Sample, Stream
from i3d_gn.data.videos import RandomClips, TestVideos
from i3d_gn.video_io.decode import VideoDecodeError, decode_frames
from i3d_gn.video_io.index import VideoIndex

OPTIONS = {
    "num_frames": 8, "stride": 2, "short_side": (40, 48), "crop_size": 32,
    "flip_probability": 0.5, "backend": "pyav", "seed": 5, "stream": Stream.TRAIN_CLIP,
}  # fmt: skip


@pytest.fixture
def index(motion_set):
    return VideoIndex.load(motion_set.train_index)


def test_sample_does_not_depend_on_its_batch(index):
    clips = RandomClips(index, **OPTIONS)
    together = clips[[Sample(0, 3), Sample(17, 4), Sample(1, 3)]]
    alone = clips[[Sample(17, 4)]]
    assert together.inputs.shape == (3, 8, 32, 32, 3)
    assert together.inputs.dtype == torch.uint8
    torch.testing.assert_close(together.inputs[1:2], alone.inputs, rtol=0, atol=0)
    assert together.labels.tolist() == [int(index.labels[v]) for v in (3, 4, 3)]
    assert not torch.equal(
        together.inputs[0], together.inputs[2]
    )  # another position, other random numbers


@pytest.mark.parametrize("change", [{"seed": 6}, {"stream": Stream.VALIDATION_CLIP}, {"salt": 1}])
def test_random_numbers_depend_on_seed_stream_and_salt(index, change):
    samples = [Sample(p, 0) for p in range(3)]
    first = RandomClips(index, **OPTIONS)[samples].inputs
    second = RandomClips(index, **{**OPTIONS, **change})[samples].inputs
    assert not torch.equal(first, second)


def test_broken_video_is_skipped_and_reported(index, monkeypatch):
    def decode(path, indices, **options):
        if path == index.path_of(1):
            raise VideoDecodeError(path, "damaged")
        return decode_frames(path, indices, **options)

    monkeypatch.setattr(videos, "decode_frames", decode)
    clips = RandomClips(index, **OPTIONS)
    batch = clips[[Sample(0, 0), Sample(1, 1), Sample(2, 2)]]
    whole = clips[[Sample(0, 0), Sample(2, 2)]]
    torch.testing.assert_close(batch.inputs, whole.inputs, rtol=0, atol=0)
    assert batch.weights.tolist() == [1, 1]
    (line,) = batch.broken
    assert "damaged" in line
    assert str(index.path_of(1)) in line
    blank = clips[[Sample(1, 1), Sample(2, 1)]]
    assert blank.inputs.shape[0] == len(blank.labels) == 1
    assert not blank.inputs.any()
    assert blank.weights.tolist() == [0]
    assert len(blank.broken) == 2
    video = make_test_videos(index)[1]
    assert video.broken is not None
    assert "damaged" in video.broken


def make_test_videos(index, **changes):
    options = {
        "num_clips": 4, "num_frames": 8, "stride": 2, "spacing": "nonlocal",
        "align_starts": False, "short_side": 40, "spatial": "full", "crop_size": 32,
        "backend": "pyav",
    }  # fmt: skip
    return TestVideos(index, **{**options, **changes})


def test_each_needed_frame_is_decoded_once(index, monkeypatch):
    requested = []

    def decode(path, indices, **options):
        requested.append(np.asarray(indices))
        return decode_frames(path, indices, **options)

    monkeypatch.setattr(videos, "decode_frames", decode)
    video = make_test_videos(index)[0]
    (indices,) = requested
    assert len(set(indices.tolist())) == len(indices) == len(video.frames)
    # nonlocal: starts 0, 5, 10, 15 of 20 frames, looping
    expected = (np.array([0, 5, 10, 15])[:, None] + 2 * np.arange(8)) % 20
    np.testing.assert_array_equal(indices[video.clips.numpy()], expected)


def test_aligned_starts_share_frames(index):
    starts = [make_test_videos(index, align_starts=a)[0] for a in (False, True)]
    assert len(starts[1].frames) == 10  # every second of 20 frames
    assert (2 * starts[1].clips[:, 0]).tolist() == [0, 4, 10, 14]  # 0, 5, 10, 15 rounded down
    assert len(starts[0].frames) == 20


@pytest.mark.parametrize(("spatial", "crops"), [("full", 1), ("center", 1), ("three_crop", 3)])
def test_crops_lie_inside_the_frames(index, spatial, crops):
    video = make_test_videos(index, spatial=spatial)[0]
    assert len(video.crops) == crops
    for top, left, height, width in video.crops:
        assert top + height <= video.frames.shape[1]
        assert left + width <= video.frames.shape[2]
        assert spatial == "full" or (height, width) == (32, 32)


def test_video_of_another_size_than_indexed_is_broken_not_squeezed(index):
    heights = index.heights.copy()
    heights[1] += 2
    replaced = dataclasses.replace(index, heights=heights)
    assert "move_" in replaced.paths[1]
    batch = RandomClips(replaced, **OPTIONS)[[Sample(0, 0), Sample(1, 1)]]
    assert len(batch.labels) == len(batch.broken) == 1
    assert str(index.path_of(1)) in batch.broken[0]
    whole = TestVideos(
        replaced, num_clips=2, num_frames=4, stride=2, spacing="nonlocal", align_starts=False,
        short_side=40, spatial="full", crop_size=32, backend="pyav",
    )  # fmt: skip
    assert whole[0].broken is None
    assert str(index.path_of(1)) in whole[1].broken
