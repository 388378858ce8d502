"""Make a small data set of video files whose classes differ only in motion.

A camera views a random texture and moves left, right, up or down, or rolls clockwise or
counterclockwise; the image moves the opposite way. Position, orientation, speed, colors, brightness
and contrast are random per clip, with the same distribution for all classes, and the texture is
statistically uniform and isotropic. So a single frame says nothing about the class; only the order
of several frames does. (A mirrored clip shows another class: train without random flips.)

Writes H.264 files OUTPUT/train/<class>/<class>_NNN.mp4 and OUTPUT/val/..., determined by --seed.
Existing clips are kept; run the same command again to resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_tools.command_line import (
    add_process_options,
    new_parser,
    parse_options,
    positive_int,
    run_script,
)
from data_tools.file_status import has_size
from data_tools.step import Item, RunOptions, run_step
from i3d_gn.files import atomic_output, print_line, remove_unfinished
from i3d_gn.video_io.h264 import X264Options, write_h264

# Camera motion per unit of speed: (right, down) in pixels, clockwise roll in radians. At 40 pixels
# from the center, half way to the corner, a roll moves the image as far as the other motions.
MOTIONS = {
    "move_down": (0.0, 1.0, 0.0),
    "move_left": (-1.0, 0.0, 0.0),
    "move_right": (1.0, 0.0, 0.0),
    "move_up": (0.0, -1.0, 0.0),
    "roll_clockwise": (0.0, 0.0, 1 / 40),
    "roll_counterclockwise": (0.0, 0.0, -1 / 40),
}
WIDTH, HEIGHT, FRAME_RATE = 128, 96, 25
SPEED_RANGE = (1.0, 2.5)  # pixels per frame
TEXTURE_SIZE = 256

# Wavelengths of the texture, in pixels. The shortest is more than twice the motion of a few frames:
# otherwise a motion looks like its opposite.
_WAVELENGTHS = (12.0, 96.0)
_SPLITS = ("train", "val")
# High quality: compression artifacts must not differ between classes either.
_X264 = X264Options(crf=18, gop=250, preset="veryfast", tune=None)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = new_parser("make-motion-clips", __doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write to")
    parser.add_argument(
        "--train-clips",
        type=positive_int,
        default=28,
        metavar="N",
        help="per class, for 6 classes (default: %(default)s)",
    )
    parser.add_argument(
        "--val-clips",
        type=positive_int,
        default=8,
        metavar="N",
        help="per class (default: %(default)s)",
    )
    parser.add_argument(
        "--num-frames",
        type=positive_int,
        default=48,
        metavar="N",
        help="per clip, at 25 frames per second (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_process_options(parser, timeout_seconds=120)
    options = parse_options(parser, argv)
    num_written, num_kept = make_motion_clips(**options)
    print_line(f"{options['output']}: {num_written} clips written, {num_kept} already there")
    return 0


def make_motion_clips(
    output: Path,
    *,
    train_clips: int,
    val_clips: int,
    num_frames: int,
    seed: int,
    workers: int,
    timeout_seconds: float,
) -> tuple[int, int]:
    """Make the missing clips below `output`; return the numbers of clips written and kept.

    `train_clips` and `val_clips` are per class.

    Raises:
        ValueError: For a negative seed, and if a clip cannot be written.
    """
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more, not {seed}")
    counts = {"train": train_clips, "val": val_clips}
    clips = [
        (split, motion, i) for split in _SPLITS for motion in MOTIONS for i in range(counts[split])
    ]
    items = [
        Item(key=_name(*clip), fingerprint=[seed, num_frames, av.__version__], argument=clip)
        for clip in clips
    ]
    step = run_step(
        partial(_write_clip, output, num_frames=num_frames, seed=seed),
        items,
        name="make clips",
        ledger_path=output / ".motion_clips.ledger.jsonl",
        run_options=RunOptions(workers=workers, timeout_seconds=timeout_seconds),
        is_intact=lambda name, done: has_size(output / name, done["num_bytes"]),
        before=lambda names: remove_unfinished(output, names),
        unit="clip",
    )
    for name, reason in step.failures.items():
        raise ValueError(f"{output / name} cannot be written: {reason}")
    return len(step.results) - step.num_kept, step.num_kept


def render_clip(
    motion: str,
    *,
    num_frames: int,
    rng: np.random.Generator,
    texture: np.ndarray | None = None,
    speed_range: tuple[float, float] = SPEED_RANGE,
) -> np.ndarray:
    """Render one clip: uint8 RGB of shape `(T, H, W, 3)`.

    Frame t shows the texture from position p_t at angle a_t. p_0 and a_0 are uniform, so p_t and
    a_t are uniform for each t with any motion: single frames of all classes have the same
    distribution.

    Args:
        motion: A key of `MOTIONS`.
        num_frames: T.
        rng: Of everything that is random.
        texture: What the camera views, float32 `(256, 256)` of mean 0 and variance 1, repeated in
            both directions; by default a random texture.
        speed_range: In pixels per frame.
    """
    if texture is None:
        texture = _random_texture(rng)
    mean_color, contrast_color = _random_colors(rng)
    place = rng.uniform(0, TEXTURE_SIZE, size=2)
    angle = rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(*speed_range)
    right, down, roll = (speed * component for component in MOTIONS[motion])

    x = np.arange(WIDTH, dtype=np.float32) - (WIDTH - 1) / 2
    y = np.arange(HEIGHT, dtype=np.float32)[:, None] - (HEIGHT - 1) / 2
    frames = np.empty((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(num_frames):
        # y points down, so a positive angle turns the camera clockwise.
        cosine, sine = np.cos(angle + roll * t), np.sin(angle + roll * t)
        seen_x, seen_y = x + right * t, y + down * t
        pattern = _sample(
            texture,
            (place[0] + cosine * seen_x - sine * seen_y).astype(np.float32),
            (place[1] + sine * seen_x + cosine * seen_y).astype(np.float32),
        )
        frames[t] = np.clip(mean_color + contrast_color * pattern[..., None], 0, 255)
    return frames


def _write_clip(
    output: Path, clip: tuple[str, str, int], *, num_frames: int, seed: int
) -> dict[str, int]:
    split, motion, i = clip
    key = (seed, _SPLITS.index(split), list(MOTIONS).index(motion), i)
    rgb = render_clip(motion, num_frames=num_frames, rng=np.random.default_rng(key))
    return {"num_bytes": write_clip(output / _name(*clip), rgb)}


def write_clip(path: Path, rgb: np.ndarray) -> int:
    """Write frames, uint8 RGB `(T, H, W, 3)`, as H.264; return the number of bytes."""
    with atomic_output(path) as temporary:
        frame_rate = Fraction(FRAME_RATE)
        write_h264(temporary, _video_frames(rgb), frame_rate=frame_rate, options=_X264)
        return temporary.stat().st_size


def _name(split: str, motion: str, i: int) -> str:
    return f"{split}/{motion}/{motion}_{i:03d}.mp4"


def _video_frames(rgb: np.ndarray) -> Iterator[av.VideoFrame]:
    reformatter = VideoReformatter()
    for t, image in enumerate(rgb):
        rgb_frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = reformatter.reformat(rgb_frame, format="yuv420p")
        frame.pts, frame.time_base = t, Fraction(1, FRAME_RATE)
        yield frame


def _random_texture(rng: np.random.Generator) -> np.ndarray:
    """An isotropic texture that tiles without seams: float32 (size, size), mean 0, variance 1.

    White noise, band-pass filtered to a range of wavelengths with equal power per octave.
    """
    frequency = np.fft.fftfreq(TEXTURE_SIZE)
    radius = np.hypot(frequency[:, None], frequency[: TEXTURE_SIZE // 2 + 1])
    shortest, longest = _WAVELENGTHS
    gain = np.where((radius > 1 / longest) & (radius < 1 / shortest), 1 / (radius + 1e-9), 0.0)
    noise = rng.standard_normal((TEXTURE_SIZE, TEXTURE_SIZE))
    texture = np.fft.irfft2(np.fft.rfft2(noise) * gain, s=noise.shape)
    return (texture / texture.std()).astype(np.float32)


def _random_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """RGB in 0-255 of the mean of the texture, and of its std; float32 (3,)."""
    brightness, contrast = rng.uniform(96, 160), rng.uniform(30, 60)
    mean_tint, contrast_tint = rng.uniform(-1, 1, size=(2, 3)).astype(np.float32)
    return brightness + 40 * mean_tint, contrast * (1 + 0.7 * contrast_tint)


def _sample(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The texture, repeated in both directions, at points (x, y), bilinearly interpolated."""
    left, top = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    right_part, bottom_part = x - left, y - top
    columns = left % TEXTURE_SIZE, (left + 1) % TEXTURE_SIZE
    rows = top % TEXTURE_SIZE * TEXTURE_SIZE, (top + 1) % TEXTURE_SIZE * TEXTURE_SIZE
    flat = texture.reshape(-1)
    upper, lower = (
        flat[row + columns[0]] * (1 - right_part) + flat[row + columns[1]] * right_part
        for row in rows
    )
    return upper * (1 - bottom_part) + lower * bottom_part


if __name__ == "__main__":
    run_script(__file__)
