"""Decoding of real Kinetics clips, and of files that decoders are known to get wrong."""

import av
import numpy as np
import pytest
import torch
from av.error import FFmpegError
from torchvision.transforms.v2 import functional as tv

from i3d_gn.data.clips import clip_indices, spaced_starts
from i3d_gn.data.transforms import random_crop_plan
from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.decode import (
    VideoDecodeError,
    count_decodable_frames,
    decode_frames,
    probe_video,
)

pytestmark = [pytest.mark.real_data, pytest.mark.timeout(300)]

# Frames of a full decode, and the error that stops it; 0 for files without decodable frames.
ODD_FRAMES = {
    "audio_only.mp4": (0, "no video stream"),
    "avi_nframes_off_by_2.avi": (96, ""),
    "chunk_out_of_range.mp4": (0, "Invalid data"),
    "cut_30k_av1.mp4": (0, "Invalid data"),
    "editlist_1fps_yuv444.mp4": (12, ""),
    "editlist_preroll.mp4": (16, ""),
    "first_pts_10s.mp4": (120, ""),
    "header_only_no_frames.mp4": (0, "no frames"),
    "hevc_10bit.mp4": (30, ""),
    "invalid_nalu.mp4": (26, "Invalid data"),
    "invalid_vp9.webm": (0, "Invalid data"),
    "malformed_box.mp4": (0, "Invalid data"),
    "mm_part_0.mp4": (32, ""),
    "moov_only_5544_claimed.mp4": (0, "no frames"),
    "nframes_header_4_real_30.mp4": (30, ""),
    "no_timescale.mp4": (8, "Invalid data"),
    "odd_161x121.webm": (30, ""),
    "one_by_one_px.mp4": (5, ""),
    "one_frame_rot90.mp4": (1, ""),
    "rotate_reflect.mp4": (30, ""),
    "rotated270.mp4": (149, ""),
    "slowmo.mp4": (63, ""),
    "tiny_zero_frames.avi": (0, "no frames"),
    "truncated_mid_stream.mp4": (28, "Invalid data"),
    "ts_h264.ts": (3, ""),
    "vfr_hevc_2tracks.mp4": (58, ""),
    "vfr_slowmo.mp4": (435, ""),
    "vp9_10bit.webm": (72, ""),
    "zero_bytes.mp4": (0, "Invalid data"),
    "zero_stsc.mp4": (0, "Invalid data"),
}

# Rotation of the stored frame, for files with a display matrix.
UPRIGHT = {
    "one_frame_rot90.mp4": lambda a: np.rot90(a, -1),
    "rotated270.mp4": lambda a: np.rot90(a, 1),
    "vfr_hevc_2tracks.mp4": lambda a: np.rot90(a, -1),
    "rotate_reflect.mp4": lambda a: a.transpose(1, 0, 2),
}


def sequential(path, wanted) -> tuple[dict[int, np.ndarray], int]:
    """Requested frames of a sequential decode, and the number of frames until it ends or fails."""
    frames, count = {}, 0
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        stream.thread_type = "NONE"
        try:
            for count, frame in enumerate(container.decode(stream), start=1):
                if count - 1 in wanted:
                    frames[count - 1] = frame.to_ndarray(format="rgb24")
        except FFmpegError:
            pass
    return frames, count


def test_list_of_odd_files_is_complete(shared_data):
    assert sorted(ODD_FRAMES) == sorted(p.name for p in (shared_data / "odd").iterdir())


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("name", ODD_FRAMES)
def test_odd_files_give_correct_frames_or_an_error(name, backend, shared_data):
    path = shared_data / "odd" / name
    num_frames, cause = ODD_FRAMES[name]
    if num_frames == 0:
        for read in (probe_video, count_decodable_frames):
            with pytest.raises(VideoDecodeError, match=cause):
                read(path)
        with pytest.raises(VideoDecodeError):
            decode_frames(path, [0], backend=backend)
        return

    assert count_decodable_frames(path) == num_frames
    rng = np.random.default_rng(0)
    indices = [0, num_frames - 1, *rng.integers(0, num_frames, 10).tolist()]
    indices += clip_indices(
        num_frames // 3, num_frames=8, stride=2, video_length=num_frames
    ).tolist()
    stored, count = sequential(path, set(indices))
    assert count == num_frames
    upright = UPRIGHT.get(name, lambda a: a)
    info = probe_video(path)
    got = decode_frames(path, indices, backend=backend)
    assert got.shape[1:3] == (info.height, info.width)
    for index, frame in zip(indices, got, strict=True):
        assert np.array_equal(frame, upright(stored[index])), f"frame {index}"

    # probe_video counts packets, including those that cannot be decoded.
    assert info.num_frames > num_frames if cause else info.num_frames == num_frames
    with pytest.raises(VideoDecodeError, match=cause or "only") as raised:
        decode_frames(
            path, range(num_frames + 1 if not cause else info.num_frames), backend=backend
        )
    assert raised.value.frame == num_frames


# Files whose frames, decoded by themselves, once differed from a sequential decode or failed.
CASES = [
    "concat_opengop_cavlc.mp4",
    "h264_i_marked_sync.mp4",
    "h264_matrix8_ycgco.mp4",
    "h264_trc9_log.mp4",
    "mjpeg_exif.avi",
    "mpeg2_primaries0.mpg",
    "prog_two_stsd_cavlc.mp4",
    "prog_two_stsd_hevc.mp4",
    "spatial_mvhevc.mov",
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("name", [*(n for n, (count, _) in ODD_FRAMES.items() if count), *CASES])
def test_each_frame_alone_equals_sequential_decode(name, backend, shared_data):
    path = shared_data / "odd" / name
    if name in CASES:
        path = shared_data.parent / "cases" / "videos" / name
    num_frames = count_decodable_frames(path)
    expected = decode_frames(path, range(num_frames))
    # YCgCo cannot be converted without resetting its tag.
    if name != "h264_matrix8_ycgco.mp4":
        frames, count = sequential(path, range(num_frames))
        assert count == num_frames
        upright = UPRIGHT.get(name, lambda a: a)
        for index in range(num_frames):
            assert np.array_equal(expected[index], upright(frames[index])), f"frame {index}"
    step = 1 if name in CASES else 1 + num_frames // 30
    wrong = [
        index
        for index in range(0, num_frames, step)
        if not np.array_equal(decode_frames(path, [index], backend=backend)[0], expected[index])
    ]
    assert not wrong
    plan = CropPlan(48, 48, 2, 4, 32, 32, flip=True)
    assert decode_frames(path, [num_frames - 1], plan=plan, backend=backend).any()


def videos_of(shared_data, folder):
    return sorted((shared_data / "kinetics_tiny" / folder).glob("*.mp4"))


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_kinetics_frames_equal_sequential_decode(backend, shared_data):
    rng = np.random.default_rng(1)
    videos = videos_of(shared_data, "train") + videos_of(shared_data, "val")
    assert len(videos) == 40
    for path in videos:
        length = probe_video(path).num_frames
        start = int(rng.integers(0, length))
        indices = clip_indices(start, num_frames=32, stride=2, video_length=length)
        indices = np.concatenate([indices, rng.integers(0, length, 4)])
        expected, count = sequential(path, set(indices.tolist()))
        assert count == length
        got = decode_frames(path, indices, backend=backend)
        for index, frame in zip(indices.tolist(), got, strict=True):
            assert np.array_equal(frame, expected[index]), f"{path.name}, frame {index}"


@pytest.mark.slow
def test_ten_clips_of_kinetics_videos(shared_data):
    for path in videos_of(shared_data, "val")[:3]:
        length = probe_video(path).num_frames
        starts = spaced_starts(
            length, num_clips=10, num_frames=32, stride=2, spacing="nonlocal"
        ).tolist()
        indices = np.concatenate(
            [clip_indices(s, num_frames=32, stride=2, video_length=length) for s in starts]
        )
        expected, _ = sequential(path, set(indices.tolist()))
        got = decode_frames(path, indices)
        assert all(
            np.array_equal(f, expected[i]) for i, f in zip(indices.tolist(), got, strict=True)
        )


def test_resized_crops_are_close_to_torchvision(shared_data):
    """The tolerances are those in the docstring of `decode_frames`."""
    rng = np.random.default_rng(2)
    differences, biases = [], []
    for path in videos_of(shared_data, "train"):
        info = probe_video(path)
        index = [int(rng.integers(0, info.num_frames))]
        frame = torch.from_numpy(decode_frames(path, index)).permute(0, 3, 1, 2)
        for _ in range(2):
            plan = random_crop_plan(
                info.height,
                info.width,
                short_side=(256, 320),
                crop_size=224,
                flip_probability=0.5,
                rng=rng,
            )
            resized = tv.resize(frame, [plan.resize_height, plan.resize_width], antialias=True)
            expected = tv.crop(resized, plan.top, plan.left, 224, 224)
            if plan.flip:
                expected = tv.horizontal_flip(expected)
            got = torch.from_numpy(decode_frames(path, index, plan=plan)).permute(0, 3, 1, 2)
            difference = got.double() - expected.double()
            differences.append(difference.abs().mean().item())
            biases.append(difference.mean().item())
    assert np.mean(differences) < 1.0
    assert max(differences) < 4.0
    assert np.median(np.abs(biases)) < 0.1
    assert abs(np.mean(biases)) < 0.2
