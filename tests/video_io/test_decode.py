"""Frames by index compared with a sequential decode, on many kinds of files."""

import gc
import os
import pickle
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from torchvision.transforms.v2 import functional as tv

from i3d_gn.data.transforms import CropPlan, evaluation_crops, random_crop_plan
from i3d_gn.video_io import decode_pyav
from i3d_gn.video_io.decode import (
    Backend,
    VideoDecodeError,
    VideoInfo,
    count_decodable_frames,
    decode_frames,
    probe_video,
)
from i3d_gn.video_io.decode_pyav import open_video, sequential_frames

pytestmark = pytest.mark.timeout(120)

H264 = {"g": "12", "bf": "3"}


def x264(parameters: str, **options: str) -> dict[str, str]:
    return {**H264, "x264-params": parameters, **options}


X265 = "keyint=12:min-keyint=12:bframes=3:log-level=none:pools=1:frame-threads=1"
VP9 = {"g": "30", "b": "100k", "lag-in-frames": "16", "auto-alt-ref": "1", "cpu-used": "8"}

# File name and encoding options.
KINDS = {
    "b-pyramid.mp4": {"options": x264("b-pyramid=normal:scenecut=0")},
    "one-gop.mp4": {"options": x264("b-pyramid=normal:scenecut=0", g="250")},
    "no-b-frames.mp4": {"options": {"g": "12", "bf": "0"}},
    "all-intra.mp4": {"options": {"g": "1"}},
    "open-gop.mp4": {"options": x264("open-gop=1:b-pyramid=normal:scenecut=0")},
    "intra-refresh.mp4": {"options": x264("intra-refresh=1:scenecut=0", bf="0")},
    "several-slices.mp4": {"options": x264("slices=4")},
    "variable-rate.mp4": {
        "options": H264,
        "frame_pts": lambda t: 49 * t - 9 * (t // 7),
    },
    "late-start.mp4": {"options": H264, "frame_pts": lambda t: 40 * t + 10_000},
    "negative-start.mkv": {"options": H264, "frame_pts": lambda t: 40 * t - 400},
    "no-index.mkv": {"options": H264, "muxer_options": {"live": "1"}},
    "transport.ts": {"options": x264("open-gop=1")},
    "interlaced.mp4": {"options": x264("tff=1")},
    "interlaced.ts": {"options": x264("tff=1")},
    "ten-bit.mp4": {"options": H264, "pixel_format": "yuv420p10le"},
    "odd-size.mp4": {"options": H264, "height": 65, "width": 97, "pixel_format": "yuv444p"},
    "odd-size.webm": {"codec": "libvpx-vp9", "height": 65, "width": 97, "options": VP9},
    "anamorphic.mp4": {"options": x264("sar=4/3")},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": X265}},
    "hevc-open-gop.mkv": {"codec": "libx265", "options": {"x265-params": X265 + ":open-gop=1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": VP9},
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "12", "preset": "12"}},
}


def index_sets(num_frames: int) -> list[list[int]]:
    """Strided and looping clips, reverse order, repeats, random frames, first and last frame."""
    rng = np.random.default_rng(num_frames)
    return [
        *[[(start + 2 * k) % num_frames for k in range(16)] for start in (0, 7, num_frames - 9)],
        list(range(num_frames - 1, -1, -1)),
        [5, 5, 3, 5],
        rng.integers(0, num_frames, 5).tolist(),
        [0, num_frames - 1],
        [num_frames // 2],
    ]


def assert_exact(path: Path, expected: np.ndarray, backend: Backend = "pyav") -> None:
    """All decoded frames equal those of `expected`, which are all different."""
    assert len(np.unique(expected.reshape(len(expected), -1), axis=0)) == len(expected)
    for indices in index_sets(len(expected)):
        got = decode_frames(path, indices, backend=backend)
        wrong = [
            i
            for i, frame in zip(indices, got, strict=True)
            if not np.array_equal(frame, expected[i])
        ]
        assert not wrong, f"wrong frames {wrong} of {indices}"


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("name", KINDS)
def test_frames_equal_sequential_decode(name, backend, tmp_path, encode_video, decode_sequentially):
    path = encode_video(tmp_path / name, **KINDS[name])
    expected = decode_sequentially(path)
    assert len(expected) == 60
    assert probe_video(path).num_frames == count_decodable_frames(path) == 60
    assert_exact(path, expected, backend)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_edit_list(backend, tmp_path, plain_video, remux_video, decode_sequentially):
    """Packets before the cut are stored for reference, but their frames are not shown."""
    path = remux_video(
        plain_video,
        tmp_path / "cut.mp4",
        first_packet=12,
        shift_frames=-15,
        avoid_negative_ts="disabled",
    )
    with av.open(str(path)) as container:
        assert any(packet.is_discard for packet in container.demux(video=0))
    expected = decode_sequentially(path)
    assert probe_video(path).num_frames == len(expected) == 45
    assert_exact(path, expected, backend)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_cut_inside_open_gop(backend, tmp_path, encode_video, remux_video, decode_sequentially):
    """The first frames reference a GOP that was removed; decoders drop them."""
    whole = encode_video(
        tmp_path / "open.mp4", options=x264("open-gop=1:b-pyramid=normal:scenecut=0")
    )
    path = remux_video(whole, tmp_path / "cut.mp4", first_packet=10)
    expected = decode_sequentially(path)
    assert probe_video(path).num_frames == len(expected) < 50
    assert_exact(path, expected, backend)


# B-frames of the encoder, and timestamps by packet number that contradict the order in the stream.
CONTRADICTIONS = {
    "b-frames in decoding order": ("3", lambda n: 40 * n),
    "two frames swapped": ("0", lambda n: 40 * n + (60 if n == 30 else 0)),
    "a frame shown after the next keyframe": ("0", lambda n: 40 * n + (900 if n == 26 else 0)),
    "two GOPs interleaved": ("0", lambda n: 40 * (n - 12) + 20 if 12 <= n < 24 else 40 * n),
}


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_timestamps_contradicting_the_stream(
    kind, container, backend, tmp_path, encode_video, decode_sequentially
):
    """Decoders output frames in the order of the stream, whatever the container says."""
    b_frames, milliseconds = CONTRADICTIONS[kind]
    options = x264("scenecut=0:b-adapt=0", bf=b_frames)
    source = encode_video(tmp_path / "source.mkv", options=options)
    path = tmp_path / f"contradiction.{container}"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        copy = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            packet.dts, packet.pts = number, 100 + milliseconds(number)
            packet.stream = copy
            writer.mux(packet)
    expected = decode_sequentially(path)
    assert_exact(path, expected, backend)
    for index in range(60):
        assert np.array_equal(decode_frames(path, [index], backend=backend)[0], expected[index])


def test_damaged_frames_equal_sequential_decode(tmp_path, encode_video):
    """Error concealment in a damaged frame depends on the frames decoded before."""
    options = x264("b-pyramid=normal:scenecut=0")
    bitexact = {"fflags": "+bitexact"}  # no random identifiers: damage the same bytes each time
    path = encode_video(tmp_path / "damaged.mkv", options=options, muxer_options=bitexact)
    whole = path.read_bytes()
    compared = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        at = int(rng.integers(1000, len(data) - 2000))
        data[at : at + 12] = rng.bytes(12)
        path.write_bytes(data)
        expected, failed = [], False
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "NONE"
            try:
                for frame in container.decode(video=0):
                    expected.append(frame.to_ndarray(format="rgb24"))
            except av.FFmpegError:
                failed = True
        if len(expected) < 60 and not failed:
            continue  # a frame is lost without an error, which only a full decode can detect
        for index in range(0, 60, 3):
            try:
                got = decode_frames(path, [index])[0]
            except VideoDecodeError:
                assert index >= len(expected)
                continue
            if index < len(expected):
                assert np.array_equal(got, expected[index]), (seed, index)
                compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", ["b-pyramid.mp4", "open-gop.mp4", "no-index.mkv", "vp9.webm"])
def test_large_files_are_read_by_seeking(
    name, tmp_path, encode_video, decode_sequentially, monkeypatch
):
    path = encode_video(tmp_path / name, **KINDS[name])
    monkeypatch.setattr(decode_pyav, "KEEP_PACKETS_BYTES", 0)
    assert_exact(path, decode_sequentially(path))


@pytest.mark.parametrize(
    "name", ["b-pyramid.mp4", "open-gop.mp4", "variable-rate.mp4", "hevc-open-gop.mkv", "av1.mp4"]
)
def test_packets_after_the_last_frame_are_not_read(
    name, tmp_path, encode_video, decode_sequentially, monkeypatch
):
    path = encode_video(tmp_path / name, **KINDS[name])
    expected = decode_sequentially(path)
    monkeypatch.setattr(decode_pyav, "CHUNK_PACKETS", 1)
    monkeypatch.setattr(decode_pyav, "MAX_REORDER", 4)  # these streams reorder no further
    build = decode_pyav.FrameTableBuilder.build
    read = []

    def count(self):
        table = build(self)
        read.append(len(table.packet_pts))
        return table

    monkeypatch.setattr(decode_pyav.FrameTableBuilder, "build", count)
    for last in range(60):
        got = decode_frames(path, [last, last // 2])
        assert np.array_equal(got, expected[[last, last // 2]])
    assert read == [min(60, last + 5) for last in range(60)]


def test_only_needed_frames_are_decoded(plain_video, monkeypatch):
    """A frame in the fourth GOP needs part of that GOP, without unreferenced frames."""
    decoded = []
    take = decode_pyav.FrameCollector.take

    def count(self, index, frame):
        decoded.append(index)
        take(self, index, frame)

    monkeypatch.setattr(decode_pyav.FrameCollector, "take", count)
    decode_frames(plain_video, [40])
    assert 40 in decoded
    assert len(decoded) <= 5
    assert min(decoded) == 36
    decoded.clear()
    decode_frames(plain_video, range(0, 60, 2))
    assert len(decoded) < 45


def test_repeated_indices_are_converted_once(plain_video, monkeypatch):
    written = []
    monkeypatch.setattr(
        decode_pyav.FrameWriter, "write", lambda self, frame, row: written.append(frame.pts)
    )
    decode_frames(plain_video, [7, 3, 7, 3, 3])
    assert len(written) == 2


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
        ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((0, 1, 1, 0), lambda a: a.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
    ],
)
def test_rotation_and_mirroring_are_applied(
    matrix, upright, tmp_path, plain_video, decode_sequentially
):
    """The matrix of the track header (ISO 14496-12, 8.3.2) is patched in the file."""
    data = bytearray(plain_video.read_bytes())
    identity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    at = data.find(identity, data.find(b"tkhd"))
    a, b, c, d = (v << 16 for v in matrix)
    data[at : at + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    path = tmp_path / "rotated.mp4"
    path.write_bytes(data)
    stored = decode_sequentially(path)
    expected = np.stack([upright(frame) for frame in stored])

    info = probe_video(path)
    assert (info.height, info.width) == expected.shape[1:3]
    indices = [4, 9, 30]
    assert np.array_equal(decode_frames(path, indices), expected[indices])
    assert np.array_equal(decode_frames(path, indices, backend="decord"), expected[indices])
    height, width = expected.shape[1:3]
    for flip in (False, True):
        crop = CropPlan(height, width, 6, 10, 40, 30, flip=flip)
        wanted = expected[indices, 6:46, 10:40]
        got = decode_frames(path, indices, plan=crop)
        assert np.array_equal(got, wanted[:, :, ::-1] if flip else wanted)
    # The same window of the resized frame for any stored orientation.
    crop = CropPlan(height * 5 // 4, width * 5 // 4, 9, 21, 50, 44, flip=True)
    assert mean_difference(decode_frames(path, indices, plan=crop), expected[indices], crop) < 2.5


def torchvision_crop(frames: np.ndarray, plan: CropPlan) -> np.ndarray:
    resized = tv.resize(
        torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2),
        [plan.resize_height, plan.resize_width],
        antialias=True,
    )
    cropped = tv.crop(resized, plan.top, plan.left, plan.height, plan.width)
    if plan.flip:
        cropped = tv.horizontal_flip(cropped)
    return cropped.permute(0, 2, 3, 1).numpy()


def mean_difference(got: np.ndarray, frames: np.ndarray, plan: CropPlan) -> float:
    expected = torchvision_crop(frames, plan)
    assert got.shape == expected.shape
    return float(np.abs(got.astype(np.float64) - expected).mean())


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize(("height", "width"), [(256, 340), (340, 256), (240, 426), (360, 640)])
def test_resized_crops_match_torchvision(
    height, width, backend, tmp_path, encode_video, decode_sequentially
):
    path = encode_video(
        tmp_path / "video.mp4", height=height, width=width, num_frames=4, options=H264
    )
    frames = decode_sequentially(path)
    biases = []
    rng = np.random.default_rng(height)
    for _ in range(12):
        plan = random_crop_plan(
            height, width, short_side=(256, 320), crop_size=224, flip_probability=0.5, rng=rng
        )
        got = decode_frames(path, [1, 3], plan=plan, backend=backend)
        assert mean_difference(got, frames[[1, 3]], plan) < 2.0
        biases.append((got - torchvision_crop(frames[[1, 3]], plan).astype(np.float64)).mean())
    assert max(np.abs(biases)) < 1.6
    if backend == "pyav":
        assert np.median(np.abs(biases)) < 0.1


@pytest.mark.parametrize("short_side", [257, 273, 313])
def test_odd_height_does_not_shift_colors(short_side, tmp_path, encode_video, decode_sequentially):
    path = encode_video(tmp_path / "video.mp4", height=256, width=340, num_frames=2, options=H264)
    width = 340 * short_side // 256
    for top in (0, 5, short_side - 225):
        plan = CropPlan(short_side, width, top, 11, 224, 224)
        expected = torchvision_crop(decode_sequentially(path)[:1], plan).astype(np.float64)
        assert abs((decode_frames(path, [0], plan=plan) - expected).mean()) < 0.1


def test_shrinking_is_antialiased(tmp_path, encode_video, decode_sequentially):
    """Stripes too fine for the small image turn gray, not into coarser stripes."""
    path = tmp_path / "stripes.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "1"})
        stream.height, stream.width, stream.pix_fmt = 720, 1280, "yuv420p"
        pixels = np.zeros((720, 1280, 3), dtype=np.uint8)
        pixels[:, ::3] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    plan, _ = evaluation_crops(720, 1280, short_side=160, mode="full")
    got = decode_frames(path, [0], plan=plan)
    assert mean_difference(got, decode_sequentially(path), plan) < 3
    assert got[:, 8:-8, 8:-8].std() < 12 < pixels.std()


def test_unscaled_crop_is_exact(plain_video, decode_sequentially):
    frames = decode_sequentially(plain_video)
    for top, left, flip in [(0, 0, False), (3, 5, False), (7, 30, True)]:
        plan = CropPlan(64, 96, top, left, 48, 50, flip)
        expected = frames[[2, 8], top : top + 48, left : left + 50]
        got = decode_frames(plain_video, [2, 8], plan=plan)
        assert np.array_equal(got, expected[:, :, ::-1] if flip else expected)


@pytest.mark.parametrize(
    "options",
    [
        {"pixel_format": "yuv420p10le"},
        {"pixel_format": "yuv422p"},
        {"codec": "libvpx-vp9", "height": 65, "width": 97, "options": VP9},
    ],
)
def test_unscaled_crop_is_exact_in_any_pixel_format(
    options, tmp_path, encode_video, decode_sequentially
):
    path = encode_video(tmp_path / "video.mkv", num_frames=8, **options)
    frames = decode_sequentially(path)
    height, width = frames.shape[1:3]
    for top, left, size in [(3, 5, 40), (16, 31, 1), (1, width - 50, 50)]:
        plan = CropPlan(height, width, top, left, size, size, flip=True)
        expected = frames[[5, 2], top : top + size, left : left + size][:, :, ::-1]
        assert np.array_equal(decode_frames(path, [5, 2], plan=plan), expected)


def test_output_array_is_filled_and_returned(plain_video):
    plan = CropPlan(64, 96, 0, 0, 32, 32)
    for backend in ("pyav", "decord"):
        out = np.empty((3, 32, 32, 3), dtype=np.uint8)
        assert decode_frames(plain_video, [3, 1, 3], plan=plan, backend=backend, out=out) is out
        assert np.array_equal(out, decode_frames(plain_video, [3, 1, 3], plan=plan))


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        ([], {}, "non-empty list of integers"),
        ([0.5], {}, "non-empty list of integers"),
        ([[1, 2]], {}, "non-empty list of integers"),
        ([3, -1], {}, "-1 is negative"),
        ([0], {"out": np.empty((2, 64, 96, 3), np.uint8)}, "out has shape"),
        ([0], {"out": np.empty((1, 64, 96, 3), np.float32)}, "out must be uint8"),
    ],
)
def test_invalid_arguments(indices, options, message, backend, plain_video):
    with pytest.raises(ValueError, match=message):
        decode_frames(plain_video, indices, backend=backend, **options)


def test_unknown_backend_lists_backends(plain_video):
    with pytest.raises(ValueError, match="pyav, decord"):
        decode_frames(plain_video, [0], backend="opencv")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("name", ["b-pyramid.mp4", "transport.ts"])
def test_index_past_the_end(name, backend, tmp_path, encode_video):
    path = encode_video(tmp_path / name, **KINDS[name])
    with pytest.raises(VideoDecodeError, match="only 60 frames") as raised:
        decode_frames(path, [0, 60], backend=backend)
    assert raised.value.frame == 60
    assert raised.value.path == str(path)


def test_probe_video(tmp_path, encode_video, plain_video):
    expected = VideoInfo(
        num_frames=60, fps=25.0, duration_seconds=2.4, width=96, height=64, codec="h264"
    )
    assert probe_video(plain_video) == expected
    slow = encode_video(tmp_path / "slow.mkv", options=H264, rate=5, num_frames=30)
    info = probe_video(slow)
    assert (info.num_frames, info.fps) == (30, 5.0)
    assert info.duration_seconds == pytest.approx(6.0, abs=0.01)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_probe_video_with_one_frame(container, tmp_path, encode_video):
    path = encode_video(tmp_path / f"one.{container}", num_frames=1, rate=20)
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.duration_seconds) == (1, 20.0, 0.05)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_truncated_file(backend, tmp_path, encode_video, decode_sequentially):
    """Frames before the end are right; one past it is an error."""
    whole = encode_video(
        tmp_path / "whole.mp4", options=H264, muxer_options={"movflags": "faststart"}
    )
    frames = decode_sequentially(whole)
    path = tmp_path / "cut.mp4"
    data = whole.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    good = count_decodable_frames(path)
    assert 20 < good < 60
    indices = [0, good // 2, good - 4]
    assert np.array_equal(decode_frames(path, indices, backend=backend), frames[indices])
    with pytest.raises(VideoDecodeError):
        decode_frames(path, [59], backend=backend)


@pytest.mark.parametrize("content", [b"", b"not a video" * 100])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_not_a_video(content, backend, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    for read in (probe_video, count_decodable_frames):
        with pytest.raises(VideoDecodeError, match=r"broken\.mp4: Invalid data"):
            read(path)
    with pytest.raises(VideoDecodeError, match=r"broken\.mp4: Invalid data"):
        decode_frames(path, [0], backend=backend)


def test_missing_file(tmp_path):
    with pytest.raises(VideoDecodeError, match="No such file"):
        decode_frames(tmp_path / "none.mp4", [0])


def test_error_can_be_pickled():
    """Loader workers send it to the main process."""
    error = VideoDecodeError("a.mp4", "broken", frame=3)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.cause, copy.frame) == ("a.mp4", "broken", 3)
    assert str(copy) == str(error) == "a.mp4, frame 3: broken"


def test_file_names_like_options_or_patterns(tmp_path, plain_video, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-0abc.mp4", "_a b.mp4", "a%03d.mp4", "a:b.mp4", "[x]*.mp4"):
        shutil.copy(plain_video, tmp_path / name)
        assert len(decode_frames(Path(name), [0, 5])) == 2
        assert len(decode_frames(Path(name), [0, 5], backend="decord")) == 2


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_metadata_in_another_encoding_is_ignored(backend, tmp_path, plain_video):
    path = tmp_path / "titled.mp4"
    with av.open(str(plain_video)) as reader, av.open(str(path), "w") as writer:
        writer.metadata["title"] = "PLACEHOLDER"
        copy = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.size:
                packet.stream = copy
                writer.mux(packet)
    data = path.read_bytes()
    assert data.count(b"PLACEHOLDER") == 1
    path.write_bytes(data.replace(b"PLACEHOLDER", "Caf\u00e9 \u00fcber!".encode("latin1")))
    assert probe_video(path).num_frames == 60
    assert len(decode_frames(path, [3], backend=backend)) == 1


def test_attached_picture_is_not_a_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as writer:
        audio = writer.add_stream("aac", rate=44_100)
        cover = writer.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt = 64, 96, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 44_100
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), dtype=np.uint8))
        writer.mux([*audio.encode(silence), *cover.encode(picture)])
        writer.mux([*audio.encode(None), *cover.encode(None)])
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    for read in (probe_video, lambda p: decode_frames(p, [0])):
        with pytest.raises(VideoDecodeError, match="no video stream"):
            read(path)


def write_streams(path: Path, streams: list[dict]) -> Path:
    """Streams of gray frames, each of its own gray."""
    with av.open(str(path), "w") as container:
        outputs = []
        for options in streams:
            stream = container.add_stream(options["codec"], rate=25)
            stream.height, stream.width = options["height"], 64
            stream.pix_fmt = "yuvj420p" if options["codec"] == "mjpeg" else "yuv420p"
            stream.disposition = options.get("disposition", 0)
            outputs.append(stream)
        for options, stream in zip(streams, outputs, strict=True):
            gray = np.full((options["height"], 64, 3), options["height"], np.uint8)
            for _ in range(options["num_frames"]):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(gray)))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("container", ["mkv", "mp4"])
@pytest.mark.parametrize(
    ("streams", "chosen"),
    [
        # A still picture first, whether or not it is the default.
        (
            [
                {"codec": "mjpeg", "height": 48, "num_frames": 1},
                {"codec": "libx264", "height": 80, "num_frames": 10},
            ],
            1,
        ),
        (
            [
                {
                    "codec": "mjpeg",
                    "height": 48,
                    "num_frames": 1,
                    "disposition": Disposition.default,
                },
                {"codec": "libx264", "height": 80, "num_frames": 10},
            ],
            1,
        ),
        # The default stream, wherever it is.
        (
            [
                {"codec": "libx264", "height": 80, "num_frames": 10},
                {
                    "codec": "libx264",
                    "height": 48,
                    "num_frames": 10,
                    "disposition": Disposition.default,
                },
            ],
            1,
        ),
    ],
)
def test_stream_choice(streams, chosen, container, tmp_path, caplog):
    path = write_streams(tmp_path / f"streams.{container}", streams)
    info = probe_video(path)
    expected = streams[chosen]
    assert (info.height, info.num_frames) == (expected["height"], expected["num_frames"])
    (warning,) = caplog.messages
    assert f"several video streams; using stream {chosen} (h264), ignoring {1 - chosen}" in warning
    assert count_decodable_frames(path) == 10
    for backend in ("pyav", "decord"):
        frames = decode_frames(path, [9], backend=backend)
        assert abs(frames.mean() - expected["height"]) < 3


def test_one_stream_is_not_warned_of(plain_video, caplog):
    probe_video(plain_video)
    assert not caplog.records


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_times_of_b_frames_in_avi(codec, tmp_path, encode_video):
    """AVI has no presentation timestamps; FFmpeg's guesses for H.264 are out of order."""
    path = encode_video(tmp_path / "b-frames.avi", codec=codec, options={"g": "12", "bf": "2"})
    with open_video(path) as (_, stream):
        times = [frame.pts for _, frame in sequential_frames(path, stream)]
        rate = stream.average_rate
        assert stream.time_base == 1 / rate
    assert times == list(range(times[0], times[0] + 60))
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (60, 25.0)
    assert info.duration_seconds == pytest.approx(2.4)


@pytest.mark.parametrize("container", ["mkv", "flv"])
def test_frame_rate_that_is_a_clock_rate(container, tmp_path, encode_video):
    """The muxer writes the resolution of the timestamps as frame rate."""
    path = tmp_path / f"video.{container}"
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=1000)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for t in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 5 * t, np.uint8))
            frame.pts, frame.time_base = round(1000 * t / 30), Fraction(1, 1000)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    with av.open(str(path)) as reader:
        assert reader.streams.video[0].average_rate == 1000
    info = probe_video(path)
    assert info.fps == pytest.approx(30, abs=0.1)
    assert info.duration_seconds == pytest.approx(1.0, abs=0.01)


def encode_tagged(path: Path, codec: str, **tags: int) -> Path:
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream(
            codec, rate=25, options={"qp": "1"} if codec == "libx264" else {}
        )
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        ramp = np.linspace(16, 235, 96).astype(np.uint8)
        pixels = np.stack([ramp + np.zeros((64, 1), np.uint8)] * 3, axis=-1)
        for _ in range(3):
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        writer.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("codec", "tags", "accepted"),
    [
        ("libx264", {"color_trc": 9}, {}),
        ("libx264", {"colorspace": 8}, {}),
        ("libx264", {"colorspace": 14}, {}),
        ("libx264", {"colorspace": 1, "color_trc": 10}, {"colorspace": 1}),
        ("mpeg2video", {"color_primaries": 0, "color_trc": 1, "colorspace": 1}, {"colorspace": 1}),
    ],
)
def test_color_tags_that_swscale_refuses(codec, tags, accepted, tmp_path):
    """Logarithmic transfer, YCgCo, ICtCp, reserved primaries: treated as unspecified."""
    plain = encode_tagged(tmp_path / "plain.mp4", codec, **accepted)
    path = encode_tagged(tmp_path / "tagged.mp4", codec, **tags)
    with av.open(str(path)) as reader:
        frame = next(reader.decode(video=0))
        assert {name: getattr(frame, name) for name in tags} == tags
    assert probe_video(path) == probe_video(plain)
    for plan in (None, CropPlan(64, 96, 3, 5, 40, 40), CropPlan(32, 48, 0, 0, 32, 40)):
        expected = decode_frames(plain, [0, 2], plan=plan)
        assert np.array_equal(decode_frames(path, [0, 2], plan=plan), expected)


def test_probe_converts_the_first_frame(tmp_path, plain_video, monkeypatch):
    """A frame that training could not convert is found when the video is indexed."""

    def fail(self, frame, row):
        raise OSError(95, "Operation not supported")

    for writer in (decode_pyav.FrameWriter, decode_pyav.CropWriter):
        with monkeypatch.context() as patch:
            patch.setattr(writer, "write", fail)
            with pytest.raises(VideoDecodeError, match="frame 0: Operation not supported"):
                probe_video(plain_video)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_encrypted_video(backend, tmp_path, encode_video):
    options = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
        "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
    }
    path = encode_video(tmp_path / "encrypted.mp4", options=H264, muxer_options=options)
    for read in (probe_video, count_decodable_frames):
        with pytest.raises(VideoDecodeError, match=r"encrypted.mp4: the video is encrypted"):
            read(path)
    with pytest.raises(VideoDecodeError, match="is encrypted"):
        decode_frames(path, [0], backend=backend)


EXIF_TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", EXIF_TURNS)
def test_side_data_unknown_to_pyav(
    orientation, tmp_path, encode_video, join_videos, decode_sequentially
):
    """PyAV 18 has no name for EXIF and refuses the display matrix of such frames as well."""
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00" + bytes([orientation]) + b"\x00\x00"
    exif = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\x01" + entry + bytes(4)
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    source = encode_video(
        tmp_path / "source.avi", codec="mjpeg", pixel_format="yuvj420p", num_frames=3
    )

    def edit(_, number, packet):
        data = bytes(packet)
        assert data[:2] == b"\xff\xd8"
        return av.Packet(data[:2] + segment + data[2:])

    path = join_videos([source], tmp_path / "exif.avi", edit=edit)
    expected = [EXIF_TURNS[orientation](frame) for frame in decode_sequentially(source)]
    info = probe_video(path)
    assert (info.num_frames, info.height, info.width) == (3, *expected[0].shape[:2])
    assert np.array_equal(decode_frames(path, [0, 1, 2]), expected)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("name", ["plain", "transport.ts", "rotated.mp4"])
def test_size_is_checked(name, backend, tmp_path, encode_video, plain_video):
    """A file that was replaced by a video of another size is not squeezed into the plan."""
    path, size = plain_video, (64, 96)
    if name == "transport.ts":
        path = encode_video(tmp_path / name, **KINDS[name])
    elif name == "rotated.mp4":
        path, size = encode_video(tmp_path / name, options=H264, rotation=90), (96, 64)
    plan = CropPlan(80, 80, 0, 0, 64, 64)
    options = {"plan": plan, "backend": backend}
    assert np.array_equal(
        decode_frames(path, [3], size=size, **options), decode_frames(path, [3], **options)
    )
    for wrong in (size[::-1], (64, 98), (62, 96)):
        message = f"frames are {size[1]}x{size[0]} .*, expected {wrong[1]}x{wrong[0]}: was the file"
        with pytest.raises(VideoDecodeError, match=message):
            decode_frames(path, [3], size=wrong, **options)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.timeout(20)
def test_not_a_regular_file(backend, tmp_path):
    """Opening a pipe waits for a writer, and a device has no end."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/urandom")
    (tmp_path / "folder.mp4").mkdir()
    for name, kind in [
        ("pipe.mp4", "a pipe, socket or device"),
        ("device.mp4", "a pipe, socket or device"),
        ("folder.mp4", "a directory"),
    ]:
        message = rf"{name}: {kind}, not a regular file"
        for read in (probe_video, count_decodable_frames):
            with pytest.raises(VideoDecodeError, match=message):
                read(tmp_path / name)
        with pytest.raises(VideoDecodeError, match=message):
            decode_frames(tmp_path / name, [0], backend=backend)
    with pytest.raises(VideoDecodeError, match="embedded null"):
        decode_frames("a\0b.mp4", [0], backend=backend)
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "none.mp4")
    with pytest.raises(VideoDecodeError, match=r"dangling.mp4: No such file"):
        decode_frames(tmp_path / "dangling.mp4", [0], backend=backend)


def test_decord_decodes_plain_video(plain_video, caplog):
    with caplog.at_level("INFO"):
        decode_frames(plain_video, [3], backend="decord")
    assert not caplog.records


def test_decord_not_installed(plain_video, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match=r"pip install decord .* or use backend pyav"):
        decode_frames(plain_video, [0], backend="decord")


def resident_kilobytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_no_leaks(plain_video, tmp_path):
    """Files are closed and memory is freed, on success and on failure."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(plain_video.read_bytes()[:3000])
    plan = CropPlan(80, 120, 4, 4, 64, 64)

    def work(times: int) -> None:
        for _ in range(times):
            decode_frames(plain_video, [1, 30], plan=plan)
            with pytest.raises(VideoDecodeError):
                decode_frames(broken, [0])

    work(60)
    gc.collect()
    files, before = len(list(Path("/proc/self/fd").iterdir())), resident_kilobytes()
    work(300)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert resident_kilobytes() - before < 4_000
