"""Frames of a clip side by side, as one picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from i3d_gn.files import atomic_output

_CAPTION = "Description"  # of the PNG specification
_GAP = 2  # pixels between frames


@dataclass(frozen=True)
class Strip:
    """A picture of a clip, and what it shows.

    Attributes:
        caption: In words, for instance the class.
        pixels: RGB, uint8 (H, W, 3).
    """

    caption: str
    pixels: np.ndarray


def frame_strip(frames: np.ndarray, *, num_frames: int, max_height: int) -> np.ndarray:
    """Evenly spaced frames side by side, the first one included.

    Args:
        frames: RGB, uint8 (T, H, W, 3).
        num_frames: Frames to show; fewer if the clip is shorter.
        max_height: In pixels; taller frames are scaled down, others are copied.

    Returns:
        uint8 (height, width, 3), with white gaps between the frames.
    """
    count = min(num_frames, len(frames))
    chosen = [frames[i * len(frames) // count] for i in range(count)]
    height, width = chosen[0].shape[:2]
    if height > max_height:
        size = (max(1, width * max_height // height), max_height)
        chosen = [
            np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
            for frame in chosen
        ]
    gap = np.full((chosen[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    parts = [part for frame in chosen for part in (gap, frame)]
    return np.concatenate(parts[1:], axis=1)


def write_strip(path: Path, strip: Strip) -> None:
    """Write a strip as PNG, with its caption inside, atomically."""
    caption = PngImagePlugin.PngInfo()
    caption.add_itxt(_CAPTION, strip.caption)
    with atomic_output(path) as temporary:
        Image.fromarray(strip.pixels).save(temporary, format="png", pnginfo=caption)


def read_strips(folder: Path) -> list[Strip]:
    """The strips of a folder, in the order of their names; damaged files are ignored."""
    strips = []
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path) as image:
                image.load()
                caption = image.info.get(_CAPTION, "")
                strips.append(Strip(str(caption), np.asarray(image.convert("RGB"))))
        except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged PNG files
            continue
    return strips


def encode_webp(pixels: np.ndarray) -> bytes:
    """The picture as a small WebP file, with loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="webp", quality=72, method=4)
    return file.getvalue()
