"""One function per decoder: the same clip, from a file to uint8 (or float) frames cut to size.

Every peer is used as its documentation has it used by a careful user: one thread, seeking and
resizing of its own where it has them, buffers reused where it takes any. None normalises, for that
happens on the device.
Each function takes a ``Job`` and returns the frames of each clip, ``(T, H, W, 3)``.
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
    """Clips of one video, and what to cut from their frames.

    ``clips`` holds frame indices ``(num_clips, num_frames)``; ``resize`` and ``crop`` are
    ``(height, width)`` and ``(top, left, height, width)``.
    """

    path: str
    fps: float
    clips: np.ndarray
    resize: tuple[int, int]
    crop: tuple[int, int, int, int]
    flip: bool


Decoder = Callable[[Job], Sequence | np.ndarray]


def cut(frames, job: Job):
    """Crop and flip frames ``(T, H, W, 3)`` as a view, or as near to one as the array allows."""
    top, left, height, width = job.crop
    frames = frames[:, top : top + height, left : left + width]
    if not job.flip:
        return frames
    return frames[:, :, ::-1] if isinstance(frames, np.ndarray) else frames.flip(2)


_buffers: dict[str, np.ndarray] = {}


def reused(use: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same memory for the same use, as a loader would have it, whatever the size of a video."""
    size = math.prod(shape)
    if use not in _buffers or len(_buffers[use]) < size:
        _buffers[use] = np.empty(size, dtype=np.uint8)
    return _buffers[use][:size].reshape(shape)


def gather(decoded: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The clips ``(num_clips, T, H, W, 3)`` that these rows of the decoded frames make up."""
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
    """Exact seeking, resizing inside the decoder, each frame decoded once."""
    import av  # loads the FFmpeg that torchcodec is made to find  # noqa: F401
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
    """Resizing inside the decoder, each frame decoded once."""
    from decord import VideoReader, cpu

    def run(job: Job) -> Sequence | np.ndarray:
        unique, inverse = np.unique(job.clips, return_inverse=True)
        height, width = job.resize
        reader = VideoReader(job.path, ctx=cpu(0), width=width, height=height, num_threads=1)
        decoded = cut(reader.get_batch(unique.tolist()).asnumpy(), job)
        return gather(decoded, inverse.reshape(job.clips.shape))

    return run


def opencv() -> Decoder:
    """Seek to the first frame, grab on, retrieve what is wanted."""
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
    """Clip by clip, in float32 as its API returns them; resized as its short_side_scale does."""
    import torch
    from pytorchvideo.data.encoded_video import EncodedVideo

    rate_limit = 10_000

    def run(job: Job) -> Sequence | np.ndarray:
        fps = Fraction(job.fps).limit_denominator(rate_limit)
        video = EncodedVideo.from_path(job.path, decode_audio=False, decoder=decoder)
        clips = []
        for indices in job.clips:
            # A clip that loops is asked for in two parts, as its API knows no looping.
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
    """A folder where torchcodec finds FFmpeg: the libraries that PyAV brings, by their plain names.

    torchcodec brings none of its own. So both run on the same FFmpeg.
    """
    import av

    folder = Path(tempfile.mkdtemp(prefix="ffmpeg-of-pyav-"))
    bundled = Path(av.__file__).parent.parent / "av.libs"
    for library in bundled.glob("lib*") if bundled.is_dir() else []:
        name = re.match(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)", library.name)
        if name:
            (folder / (name[1] + name[2])).symlink_to(library)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
