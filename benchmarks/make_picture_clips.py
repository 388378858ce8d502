"""Motion clips too hard to saturate: pictures instead of textures, two speeds, clutter.

As `i3d-gn make-motion-clips`, with these differences:

- the camera views a real picture (in gray, tinted at random), mirrored so that it has no seams;
  pictures of validation clips come from the validation images;
- each of the six motions is slow or fast, twelve classes, so that frames must be told apart over
  time and not only ordered;
- two rectangles of another picture, which do not move, cover a quarter of the frame each.

    python benchmarks/make_picture_clips.py imagenette128.zip data/picture_clips

PICTURES is a zip file with images in folders named train and val. Writes
OUTPUT/{train,val}/<class>/<class>_NNN.mp4; the same clips every time. Existing clips are kept.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.make_motion_clips import (
    HEIGHT,
    MOTIONS,
    TEXTURE_SIZE,
    WIDTH,
    render_clip,
    write_clip,
)

SPEEDS = {"slow": (0.5, 1.0), "fast": (1.5, 2.5)}  # pixels per frame
NUM_FRAMES = 72
NUM_CLIPS = {"train": 200, "val": 20}  # per class; with 40, group norm learns them by heart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()

    with zipfile.ZipFile(options.pictures) as archive:
        for s, (split, num_clips) in enumerate(NUM_CLIPS.items()):
            names = sorted(
                name
                for name in archive.namelist()
                if f"/{split}/" in f"/{name}" and not name.endswith("/")
            )
            for m, motion in enumerate(MOTIONS):
                for v, speed in enumerate(SPEEDS):
                    for i in range(num_clips):
                        name = f"{speed}_{motion}"
                        path = options.output / split / name / f"{name}_{i:03d}.mp4"
                        if path.exists():
                            continue
                        rng = np.random.default_rng((s, m, v, i))
                        viewed, clutter = (
                            _gray(archive.read(names[k]))
                            for k in rng.choice(len(names), size=2, replace=False)
                        )
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_clip(path, _render(motion, SPEEDS[speed], viewed, clutter, rng))


def _render(
    motion: str,
    speed_range: tuple[float, float],
    viewed: np.ndarray,
    clutter: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """uint8 RGB `(T, H, W, 3)`."""
    half = np.concatenate([viewed, viewed[::-1]])
    texture = np.concatenate([half, half[:, ::-1]], axis=1)
    texture = ((texture - texture.mean()) / (texture.std() + 1e-3)).astype(np.float32)
    frames = render_clip(
        motion, num_frames=NUM_FRAMES, rng=rng, texture=texture, speed_range=speed_range
    )
    for _ in range(2):
        height, width = HEIGHT // 2, WIDTH // 2
        top, left = rng.integers(HEIGHT - height + 1), rng.integers(WIDTH - width + 1)
        frames[:, top : top + height, left : left + width] = clutter[:height, :width, None]
    return frames


def _gray(data: bytes) -> np.ndarray:
    """The center of a picture, uint8 (128, 128)."""
    size = TEXTURE_SIZE // 2
    picture = Image.open(io.BytesIO(data)).convert("L")
    scale = size / min(picture.size)
    picture = picture.resize([max(size, round(side * scale)) for side in picture.size])
    left, top = ((side - size) // 2 for side in picture.size)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


if __name__ == "__main__":
    main()
