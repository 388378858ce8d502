"""Decode damaged videos, and compare every frame with a sequential decode.

30 small videos in 10 containers are damaged by flipped bits, truncation, and ranges of bytes that
are zeroed, repeated, removed or taken from another video. Of each damaged file, `decode_frames` is
asked for all frames, single ones and a clip, with each decoder, and also as for large files, which
are not kept in memory. A frame is right if it equals that of a plain sequential decode of the
damaged file by PyAV (upright, of the size of the first), or the frame with this number of the file
before it was damaged. Frames that the decoder drops without an error may shift the numbers of
later ones, as `decode_pyav` documents. An error is right where the sequential decode fails, too, or
has no such frame. Where FFmpeg conceals damage by whatever its buffers hold, sequential decodes
differ, and no frame is right: they are undefined.

    python benchmarks/mutate_videos.py RECORD.jsonl              # 5,000 files
    python benchmarks/mutate_videos.py RECORD.jsonl --files 60

Run the same command again to resume. Prints the table of `reliability.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import av
import numpy as np
from reliability import append, read_record, table

from data_tools.processes import ItemFailure, map_in_processes
from i3d_gn.video_io import decode_pyav
from i3d_gn.video_io.decode import decode_frames, probe_video
from i3d_gn.video_io.decode_pyav import video_streams
from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.pixels import Orientation, orientation_of

HEIGHT, WIDTH, NUM_FRAMES = 48, 64, 40
DAMAGES = ("flipped bits", "truncated", "zeroed", "repeated", "removed", "spliced")
DECODERS = ("pyav", "pyav, not kept in memory", "decord")
# Mean absolute difference of 255 up to which frames are equal; those of different times differ by
# more than 6.
TOLERANCE = {"pyav": 0.5, "pyav, not kept in memory": 0.5, "decord": 3.0}

_B_FRAMES = {"g": "12", "bf": "3"}
_OPEN_GOP = {"g": "12", "bf": "3", "x264-params": "open-gop=1:cabac=0"}
_HEVC = {"g": "12", "x265-params": "log-level=none"}
# Suffix, codec, options, and side of the frame where the codec allows few.
SEEDS: list[tuple[str, str, dict[str, str]]] = [
    ("mp4", "libx264", _B_FRAMES),
    ("mp4", "libx264", _OPEN_GOP),
    ("mp4", "libx264", {"g": "250"}),
    ("mp4", "libx264", {"g": "10", "tune": "zerolatency"}),
    ("mp4", "libx265", _HEVC),
    ("mp4", "libvpx-vp9", {"g": "12"}),
    ("mp4", "libsvtav1", {"g": "12", "preset": "12"}),
    ("mp4", "mpeg4", {"g": "12", "bf": "2"}),
    ("mov", "libx264", _B_FRAMES),
    ("mov", "libx265", _HEVC),
    ("mov", "mjpeg", {}),
    ("mov", "prores", {}),
    ("mkv", "libx264", _B_FRAMES),
    ("mkv", "libx264", _OPEN_GOP),
    ("mkv", "libx265", _HEVC),
    ("mkv", "libvpx-vp9", {"g": "12"}),
    ("mkv", "ffv1", {}),
    ("webm", "libvpx", {"g": "12"}),
    ("webm", "libvpx-vp9", {"g": "12"}),
    ("webm", "libsvtav1", {"g": "12", "preset": "12"}),
    ("avi", "libx264", _B_FRAMES),
    ("avi", "mpeg4", {"g": "12"}),
    ("avi", "mjpeg", {}),
    ("ts", "libx264", _B_FRAMES),
    ("ts", "mpeg2video", {"g": "12"}),
    ("flv", "libx264", _B_FRAMES),
    ("flv", "flv", {"g": "12"}),
    ("mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    ("asf", "wmv2", {"g": "12"}),
    ("3gp", "mpeg4", {"g": "12"}),
]
_FORMATS = {"libx264": "yuv420p", "mjpeg": "yuvj420p", "prores": "yuv422p10le", "ffv1": "yuv420p"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout-seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(
            Path(folder), arguments.record, num_files=arguments.files, seed=arguments.seed,
            workers=arguments.workers, timeout_seconds=arguments.timeout_seconds,
        )  # fmt: skip
    print(table(read_record(arguments.record)))
    return 0


def run(
    folder: Path, record: Path, *, num_files: int, seed: int, workers: int, timeout_seconds: float
) -> None:
    """Make the seeds in `folder`, and check the damaged files that `record` lacks."""
    for number in range(len(SEEDS)):
        encode(folder / seed_name(number), number)
        check_seed(folder / seed_name(number))
    done = {fault["file"] for fault in read_record(record)}
    todo = [number for number in range(num_files) if number not in done]
    check = partial(check_damaged, folder, seed)
    outcomes = map_in_processes(
        check, todo, num_workers=workers, timeout_seconds=timeout_seconds, memory_bytes=4 * 2**30
    )
    with contextlib.closing(outcomes):
        for i, outcome in outcomes:
            number = todo[i]
            results = outcome.value
            if results is None:
                kind = "hung" if outcome.kind == "timeout" else "lost"
                results = [("all", kind, outcome.failure)]
            for decoder, result, detail in results:
                fault = {"kind": f"{damage_of(number)}, {decoder}", "outcome": result}
                append(record, {**fault, "file": number, "detail": detail})


def seed_name(number: int) -> str:
    return f"{number:02d}.{SEEDS[number][0]}"


def damage_of(number: int) -> str:
    return DAMAGES[number // len(SEEDS) % len(DAMAGES)]


def encode(path: Path, number: int) -> None:
    """Encode smooth motion, with the number of each frame as bars."""
    _, codec, options = SEEDS[number]
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
    with av.open(str(path), "w", format={"3gp": "3gp", "mpg": "vob", "asf": "asf"}.get(
        path.suffix[1:])) as container:  # fmt: skip
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = _FORMATS.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        for t in range(NUM_FRAMES):
            image = np.empty((HEIGHT, WIDTH, 3))
            for channel in range(3):
                wave = np.sin(columns / 9 + 0.4 * t + channel) + np.cos(rows / 7 - 0.5 * t)
                image[..., channel] = 127 + 45 * wave
            for bit in range(6):
                image[: HEIGHT // 3, bit * 10 : bit * 10 + 10] = 235 if t >> bit & 1 else 20
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts = t
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def check_seed(path: Path) -> None:
    """The intact file must be decoded exactly, and its frames must differ."""
    whole, _ = sequential(path)
    assert len(whole) == NUM_FRAMES, (path, len(whole))
    for decoder in DECODERS:
        frames = decode(path, list(range(NUM_FRAMES)), decoder)
        assert all(same(a, b, decoder) for a, b in zip(frames, whole, strict=True)), path
    distances = [difference(a, b) for a, b in itertools.pairwise(whole)]
    assert min(distances) > 6, (path, min(distances))


def damage(content: bytes, other: bytes, kind: str, rng: random.Random) -> bytes:
    """Damage the bytes of a file."""
    size = len(content)
    data = bytearray(content)
    first = rng.randrange(size)
    count = min(rng.choice([1, 16, 200, 2000]), size - first)
    if kind == "flipped bits":
        for _ in range(rng.choice([1, 3, 10, 50])):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del data[max(1, first) :]
    elif kind == "zeroed":
        data[first : first + count] = bytes(count)
    elif kind == "repeated":
        data[first:first] = data[first : first + count]
    elif kind == "removed":
        del data[first : first + count]
    else:
        start = rng.randrange(max(1, len(other) - count))
        data[first : first + count] = other[start : start + count]
    return bytes(data)


def sequential(
    path: Path, *, tolerant: bool = False, hold: bool = False
) -> tuple[list[np.ndarray], str | None]:
    """All frames in order up to the first error (`tolerant`: also after it), and that error.

    With `hold`, all frames are held, so that the decoder never uses a buffer twice.
    """
    held, size, turn = [], {}, Orientation()
    frames: list[np.ndarray] = []
    failure: str | None = None
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            streams = video_streams(container)
            if not streams or streams[0].codec_context is None:
                return [], "no video stream"
            streams[0].thread_type, streams[0].codec_context.thread_count = "NONE", 1
            for packet in container.demux(streams[0]):
                try:
                    decoded = packet.decode()
                    held += decoded if hold else []
                    if decoded and not size:
                        size = {"width": decoded[0].width, "height": decoded[0].height}
                        turn = orientation_of(decoded[0])
                    frames += [upright(f.to_ndarray(format="rgb24", **size), turn) for f in decoded]
                except (av.FFmpegError, ValueError) as error:
                    failure = failure or str(error)
                    if not tolerant:
                        break
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        failure = failure or str(error)
    return frames, failure


def upright(image: np.ndarray, turn: Orientation) -> np.ndarray:
    image = image.swapaxes(0, 1) if turn.transpose else image
    image = image[::-1] if turn.flip_rows else image
    return image[:, ::-1] if turn.flip_columns else image


def difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return 255.0
    return float(np.abs(a.astype(np.int16) - b).mean())


def same(a: np.ndarray, b: np.ndarray, decoder: str) -> bool:
    return difference(a, b) <= TOLERANCE[decoder]


def decode(path: Path, indices: list[int], decoder: str) -> np.ndarray:
    if decoder == "pyav, not kept in memory":
        with mock.patch.object(decode_pyav, "KEEP_PACKETS_BYTES", 0):
            return decode_frames(path, indices)
    return decode_frames(path, indices, backend=decoder)  # type: ignore[arg-type]


def check_damaged(folder: Path, seed: int, number: int) -> list[tuple[str, str, str]]:
    """(decoder, outcome, detail) for damaged file `number`; runs in a child process."""
    logging.disable(logging.CRITICAL)
    rng = random.Random(f"{seed}-{number}")
    source = folder / seed_name(number % len(SEEDS))
    other = folder / seed_name(rng.randrange(len(SEEDS)))
    path = folder / f"damaged-{os.getpid()}{source.suffix}"
    path.write_bytes(damage(source.read_bytes(), other.read_bytes(), damage_of(number), rng))
    try:
        original, _ = sequential(source)
        reference, failure = sequential(path)
        later = sequential(path, tolerant=True)[0] if failure else []
        held, _ = sequential(path, hold=True)
        pairs = enumerate(zip(reference, held, strict=False))
        undefined = {i for i, (a, b) in pairs if not same(a, b, "pyav")}
        with contextlib.suppress(VideoDecodeError):  # as indexing does; it may refuse the file
            probe_video(path)
        clips = [[*range(NUM_FRAMES)], [rng.randrange(NUM_FRAMES)], [rng.randrange(NUM_FRAMES)]]
        start = rng.randrange(NUM_FRAMES - 16)
        clips.append([*range(start, start + 16, 2)])
        if 0 < len(reference) < NUM_FRAMES:
            clips.append([*range(len(reference))])
        results = []
        for decoder in DECODERS:
            outcome, detail = "survived", "right"
            for clip in clips:
                what = verdict(path, clip, decoder, reference, later, original, undefined)
                if what in ("right", "refused", "undefined"):
                    detail = detail if what == "right" else what
                    continue
                outcome, detail = what.split(":")[0], f"{source.name} {clip[:3]}: {what}"
                break
            results.append((decoder, outcome, detail))
        return results
    except MemoryError as error:
        raise ItemFailure("out of memory") from error
    finally:
        path.unlink(missing_ok=True)


def verdict(
    path: Path,
    clip: list[int],
    decoder: str,
    reference: list[np.ndarray],
    later: list[np.ndarray],
    original: list[np.ndarray],
    undefined: set[int],
) -> str:
    """How decoding of `clip` ended."""
    try:
        frames = decode(path, clip, decoder)
    except VideoDecodeError as error:
        if max(clip) < len(reference):
            return f"lost: {error.cause} (frame {error.frame})"
        return "refused"
    for index, frame in zip(clip, frames, strict=True):
        dropped = max(0, len(original) - len(reference))
        candidates = [*original[index : index + 1], *reference[max(0, index - dropped) : index + 1]]
        if index >= len(reference):  # after the first error
            candidates += later
        if index in undefined:
            return "undefined"
        if not any(same(frame, candidate, decoder) for candidate in candidates):
            nearest = min((difference(frame, c) for c in candidates), default=255.0)
            return f"silently wrong: frame {index} differs by {nearest:.1f}"
    return "right"


if __name__ == "__main__":
    sys.exit(main())
