"""Make a small data set in COCO's format: colored disks, squares and triangles with masks.

    python benchmarks/make_coco_shapes.py data/coco_shapes --train 400 --val 60

Every eighth image has no object, and every eighth has a crowd of small disks, annotated as one RLE
with `iscrowd`. Colors say nothing of the class. Objects do not overlap, and cover the pixels that
pycocotools gives their masks.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils

SIDE = 64  # pixels of an image
CLASSES = {3: "disk", 7: "square", 8: "triangle"}  # ids with gaps, as in COCO
_NUM_CORNERS = {3: 24, 7: 4, 8: 3}


def make_coco_shapes(folder: Path, *, num_train: int, num_val: int, seed: int = 0) -> None:
    """Write `train/`, `val/`, `train.json` and `val.json`."""
    for split, count, stream in (("train", num_train, 0), ("val", num_val, 1)):
        generator = np.random.default_rng((seed, stream))
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in range(1, count + 1):
            name = f"{i:06d}.png"
            image, objects = _image(generator, empty=i % 8 == 0, crowd=i % 8 == 4)
            image.save(folder / split / name)
            images.append({"id": i, "file_name": name, "height": SIDE, "width": SIDE})
            for annotation in objects:
                ids = {"id": len(annotations) + 1, "image_id": i}
                annotations.append({**ids, **annotation})
        categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))


def _image(
    generator: np.random.Generator, *, empty: bool, crowd: bool
) -> tuple[Image.Image, list[dict]]:
    pixels = generator.integers(0, 90, (SIDE, SIDE, 3)).astype(np.uint8)
    taken, objects = [], []
    for _ in range(0 if empty else int(generator.integers(1, 4))):
        radius = float(generator.uniform(8, 15))
        center = _free_center(generator, radius, taken)
        if center is None:
            continue
        category = int(generator.choice(list(_NUM_CORNERS)))
        corners = _corners(category, center, radius)
        objects.append(_annotation(category, corners))
        (rle,) = mask_utils.frPyObjects(objects[-1]["segmentation"], SIDE, SIDE)
        pixels[mask_utils.decode(rle) == 1] = _color(generator)
        taken.append((*center, radius))
    center = _free_center(generator, 13, taken) if crowd else None
    if center is not None:
        crowded = np.zeros((SIDE, SIDE), dtype=np.uint8)
        for _ in range(12):
            x, y = np.array(center) + generator.uniform(-10, 10, 2)
            disk = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(disk).ellipse([x - 3, y - 3, x + 3, y + 3], fill=1)
            pixels[np.array(disk) == 1] = _color(generator)
            crowded |= np.array(disk)
        objects.append(_crowd(crowded))
    return Image.fromarray(pixels), objects


def _free_center(
    generator: np.random.Generator, radius: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float] | None:
    for _ in range(50):
        x, y = generator.uniform(radius + 1, SIDE - radius - 1, 2)
        if all(math.hypot(x - a, y - b) > radius + r + 1 for a, b, r in taken):
            return float(x), float(y)
    return None


def _corners(category: int, center: tuple[float, float], radius: float) -> np.ndarray:
    count = _NUM_CORNERS[category]
    angles = 2 * math.pi * (np.arange(count) / count) + (
        math.pi / 4 if count == 4 else -math.pi / 2
    )
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + np.array(center)


def _color(generator: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in generator.integers(120, 256, 3))
    return red, green, blue


def _annotation(category: int, corners: np.ndarray) -> dict:
    (x1, y1), (x2, y2) = corners.min(0), corners.max(0)
    x, y = corners.T
    area = abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
    return {
        "category_id": category,
        "bbox": [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
        "area": area,
        "iscrowd": 0,
        "segmentation": [[round(float(v), 2) for v in corners.flatten()]],
    }


def _crowd(mask: np.ndarray) -> dict:
    """One annotation for all disks: uncompressed RLE, column by column, first the background."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, len(flat)]).tolist()
    ys, xs = np.nonzero(mask)
    box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
    return {
        "category_id": 3,
        "bbox": [int(v) for v in box],
        "area": int(mask.sum()),
        "iscrowd": 1,
        "segmentation": {"size": [SIDE, SIDE], "counts": ([0] if flat[0] else []) + counts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=400, help="images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=60, help="images (default: %(default)s)")
    args = parser.parse_args()
    make_coco_shapes(args.folder, num_train=args.train, num_val=args.val)
    print(f"{args.folder}: {args.train} training and {args.val} validation images")


if __name__ == "__main__":
    main()
