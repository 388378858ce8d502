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


def test_a_sample_does_not_depend_on_its_batch(index):
    clips = RandomClips(index, **OPTIONS)
    together = clips[[Sample(0, 3), Sample(17, 4), Sample(1, 3)]]
    alone = clips[[Sample(17, 4)]]
    assert together.clips.shape == (3, 8, 32, 32, 3)
    assert together.clips.dtype == torch.uint8
    torch.testing.assert_close(together.clips[1:2], alone.clips, rtol=0, atol=0)
    assert together.labels.tolist() == [int(index.labels[v]) for v in (3, 4, 3)]
    assert not torch.equal(together.clips[0], together.clips[2])  # other positions, other draws


@pytest.mark.parametrize("change", [{"seed": 6}, {"stream": Stream.VALIDATION_CLIP}, {"salt": 1}])
def test_seed_stream_and_salt_change_the_draws(index, change):
    samples = [Sample(p, 0) for p in range(3)]
    first = RandomClips(index, **OPTIONS)[samples].clips
    second = RandomClips(index, **{**OPTIONS, **change})[samples].clips
    assert not torch.equal(first, second)


def test_a_broken_video_is_left_out_and_named(index, monkeypatch):
    def decode(path, indices, **options):
        if path == index.path_of(1):
            raise VideoDecodeError(path, "damaged")
        return decode_frames(path, indices, **options)

    monkeypatch.setattr(videos, "decode_frames", decode)
    clips = RandomClips(index, **OPTIONS)
    batch = clips[[Sample(0, 0), Sample(1, 1), Sample(2, 2)]]
    whole = clips[[Sample(0, 0), Sample(2, 2)]]
    torch.testing.assert_close(batch.clips, whole.clips, rtol=0, atol=0)
    assert batch.weights.tolist() == [1, 1]
    (line,) = batch.broken
    assert "damaged" in line
    assert str(index.path_of(1)) in line
    blank = clips[[Sample(1, 1)]]
    assert blank.clips.shape[0] == 1
    assert blank.weights.tolist() == [0]
    assert len(blank.broken) == 1
    video = videos_to_test(index)[1]
    assert video.broken is not None
    assert "damaged" in video.broken


def videos_to_test(index, **changes):
    options = {
        "num_clips": 4, "num_frames": 8, "stride": 2, "spacing": "nonlocal",
        "align_starts": False, "short_side": 40, "spatial": "full", "crop_size": 32,
        "backend": "pyav",
    }  # fmt: skip
    return TestVideos(index, **{**options, **changes})


def test_a_test_video_holds_each_needed_frame_once(index, monkeypatch):
    asked = []

    def decode(path, indices, **options):
        asked.append(np.asarray(indices))
        return decode_frames(path, indices, **options)

    monkeypatch.setattr(videos, "decode_frames", decode)
    video = videos_to_test(index)[0]
    (indices,) = asked
    assert len(set(indices.tolist())) == len(indices) == len(video.frames)
    # nonlocal: starts 0, 5, 10, 15 of 20 frames, wrapping round
    expected = (np.array([0, 5, 10, 15])[:, None] + 2 * np.arange(8)) % 20
    np.testing.assert_array_equal(indices[video.clips.numpy()], expected)


def test_aligned_starts_share_frames(index):
    starts = [videos_to_test(index, align_starts=a)[0] for a in (False, True)]
    assert len(starts[1].frames) == 10  # every second of 20 frames
    assert len(starts[0].frames) == 20


@pytest.mark.parametrize(("spatial", "crops"), [("full", 1), ("center", 1), ("three_crop", 3)])
def test_crops_lie_inside_the_frames(index, spatial, crops):
    video = videos_to_test(index, spatial=spatial)[0]
    assert len(video.crops) == crops
    for top, left, height, width in video.crops:
        assert top + height <= video.frames.shape[1]
        assert left + width <= video.frames.shape[2]
        assert spatial == "full" or (height, width) == (32, 32)
