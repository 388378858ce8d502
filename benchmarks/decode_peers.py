"""One function per decoder: the same clip, from a file to resized and cropped frames.

Every decoder is used as its documentation recommends: on one thread, with its own seeking and
resizing where available, and with reused buffers where it accepts any. None normalizes, which is
done on the device. Each function returns a function that takes a `Job` and returns the frames of
each clip, uint8 (float for pytorchvideo) `(T, H, W, 3)`.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Job:
    """Clips of one video, and how to resize and crop them.

    Attributes:
        path: The video file.
        fps: Its frame rate.
        clips: Frame indices `(num_clips, num_frames)`.
        resize: `(height, width)` to resize frames to, in pixels.
        crop: `(top, left, height, width)` in the resized frame, in pixels.
        flip: Whether to flip frames left to right.
    """

    path: str
    fps: float
    clips: np.ndarray
    resize: tuple[int, int]
    crop: tuple[int, int, int, int]
    flip: bool


Decoder = Callable[[Job], Sequence | np.ndarray]


def cut(frames, job: Job):
    """Crop and flip frames `(T, H, W, 3)`, as a view where possible."""
    top, left, height, width = job.crop
    frames = frames[:, top : top + height, left : left + width]
    if not job.flip:
        return frames
    return frames[:, :, ::-1] if isinstance(frames, np.ndarray) else frames.flip(2)


_buffers: dict[str, np.ndarray] = {}


def reused(use: str, shape: tuple[int, ...]) -> np.ndarray:
    """A buffer for `use`, reused between calls as in a loader."""
    size = math.prod(shape)
    if use not in _buffers or len(_buffers[use]) < size:
        _buffers[use] = np.empty(size, dtype=np.uint8)
    return _buffers[use][:size].reshape(shape)


def gather(decoded: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The clips `(num_clips, T, H, W, 3)`, taken from rows of the decoded frames."""
    if len(rows) == 1:
        return decoded[None]
    out = reused("clips", (*rows.shape, *decoded.shape[1:]))
    return np.take(decoded, rows, axis=0, out=out, mode="clip")


def i3d_gn() -> Decoder:
    from i3d_gn.data.clips import union_of_clips
    from i3d_gn.video_io.crop_plan import CropPlan
    from i3d_gn.video_io.decode import decode_frames

    def run(job: Job) -> Sequence | np.ndarray:
        frames, inverse = union_of_clips(job.clips)
        plan = CropPlan(*job.resize, *job.crop, flip=job.flip)
        out = reused("frames", (len(frames), plan.height, plan.width, 3))
        return gather(decode_frames(job.path, frames, plan=plan, out=out), inverse)

    return run


def pyav() -> Decoder:
    """Seek to the keyframe before the first frame, decode to the last, resize whole frames."""
    import av

    def run(job: Job) -> Sequence | np.ndarray:
        unique, inverse = np.unique(job.clips, return_inverse=True)
        wanted = {index: row for row, index in enumerate(unique.tolist())}
        height, width = job.resize
        decoded = reused("frames", (len(unique), height, width, 3))
        with av.open(job.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            time_base, start = stream.time_base, stream.start_time or 0
            assert time_base is not None
            container.seek(round(unique[0] / job.fps / time_base) + start, stream=stream)
            for frame in container.decode(stream):
                assert frame.pts is not None
                index = round(float((frame.pts - start) * time_base) * job.fps)
                if index in wanted:
                    rgb = frame.to_ndarray(format="rgb24", width=width, height=height)
                    decoded[wanted[index]] = rgb
                if index >= unique[-1]:
                    break
        return gather(cut(decoded, job), inverse.reshape(job.clips.shape))

    return run


def torchcodec() -> Decoder:
    """Exact seeking, resizing in the decoder, each frame decoded once."""
    import av  # loads the FFmpeg that torchcodec uses  # noqa: F401
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]
    from torchcodec.transforms import Resize  # pyright: ignore[reportPrivateImportUsage]

    def run(job: Job) -> Sequence | np.ndarray:
        unique, inverse = np.unique(job.clips, return_inverse=True)
        decoder = VideoDecoder(
            job.path, dimension_order="NHWC", num_ffmpeg_threads=1, transforms=[Resize(job.resize)]
        )
        decoded = cut(decoder.get_frames_at(indices=unique.tolist()).data, job)
        return gather(decoded.numpy(), inverse.reshape(job.clips.shape))

    return run


def decord() -> Decoder:
    """Resizing in the decoder, each frame decoded once."""
    from decord import VideoReader, cpu

    def run(job: Job) -> Sequence | np.ndarray:
        unique, inverse = np.unique(job.clips, return_inverse=True)
        height, width = job.resize
        reader = VideoReader(job.path, ctx=cpu(0), width=width, height=height, num_threads=1)
        decoded = cut(reader.get_batch(unique.tolist()).asnumpy(), job)
        return gather(decoded, inverse.reshape(job.clips.shape))

    return run


def opencv() -> Decoder:
    """Seek to the first frame, grab all frames, retrieve the requested ones."""
    import cv2  # pyright: ignore[reportMissingImports]

    cv2.setNumThreads(1)

    def run(job: Job) -> Sequence | np.ndarray:
        unique, inverse = np.unique(job.clips, return_inverse=True)
        height, width = job.resize
        decoded = reused("frames", (len(unique), height, width, 3))
        capture = cv2.VideoCapture(job.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(unique[0]))
        position = int(unique[0])
        for row, index in enumerate(unique.tolist()):
            while position <= index:
                capture.grab()
                position += 1
            _, frame = capture.retrieve()
            small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
            cv2.cvtColor(small, cv2.COLOR_BGR2RGB, dst=decoded[row])
        capture.release()
        return gather(cut(decoded, job), inverse.reshape(job.clips.shape))

    return run


def _pytorchvideo(decoder: str) -> Decoder:
    """Clip by clip, in float32 as its API returns them; resized as in its short_side_scale."""
    import torch
    from pytorchvideo.data.encoded_video import EncodedVideo

    rate_limit = 10_000

    def run(job: Job) -> Sequence | np.ndarray:
        fps = Fraction(job.fps).limit_denominator(rate_limit)
        video = EncodedVideo.from_path(job.path, decode_audio=False, decoder=decoder)
        clips = []
        for indices in job.clips:
            # A looping clip is requested in parts, as its API has no looping.
            parts = np.split(indices, np.flatnonzero(np.diff(indices) < 0) + 1)
            frames = []
            for part in parts:
                stride = int(part[1] - part[0]) if len(part) > 1 else 1
                clip = video.get_clip(Fraction(int(part[0])) / fps, (int(part[-1]) + 1) / fps)
                pixels = clip["video"]
                assert pixels is not None
                frames.append(pixels[:, ::stride])
            resized = torch.nn.functional.interpolate(
                torch.cat(frames, dim=1), size=job.resize, mode="bilinear", align_corners=False
            )
            clips.append(cut(resized.permute(1, 2, 3, 0), job))
        video.close()
        return clips

    return run


def pytorchvideo_pyav() -> Decoder:
    return _pytorchvideo("pyav")


def pytorchvideo_decord() -> Decoder:
    return _pytorchvideo("decord")


PEERS = {
    peer.__name__: peer
    for peer in (i3d_gn, torchcodec, decord, pyav, opencv, pytorchvideo_pyav, pytorchvideo_decord)
}


def library_path_for_torchcodec() -> str:
    """LD_LIBRARY_PATH with which torchcodec, which bundles no FFmpeg, finds that of PyAV.

    The libraries in PyAV's wheel have hashes in their names; this makes links without them.
    """
    import av

    folder = Path(tempfile.mkdtemp(prefix="ffmpeg-of-pyav-"))
    bundled = Path(av.__file__).parent.parent / "av.libs"
    for library in bundled.glob("lib*") if bundled.is_dir() else []:
        name = re.match(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)", library.name)
        if name:
            (folder / (name[1] + name[2])).symlink_to(library)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
