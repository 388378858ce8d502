"""Resizing, cropping, flipping and normalization of clips.

Sizes and windows are chosen here as plain numbers (`CropPlan`); the decoder applies them while it
decodes. Only normalization touches pixels here, on the device of the clip.

Sources: [NL] facebookresearch/video-nonlocal-net, `customized_video_io.cc`
(`ScaleTransform`, `ClipTransformFlex`).
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch

from i3d_gn.video_io.crop_plan import CropPlan

__all__ = [
    "CropPlan",
    "SpatialMode",
    "evaluation_crops",
    "normalize_clips",
    "rand_augment",
    "random_crop_plan",
]

SpatialMode = Literal["full", "three_crop", "center"]


def random_crop_plan(
    height: int,
    width: int,
    *,
    short_side: tuple[int, int],
    crop_size: int,
    flip_probability: float,
    rng: np.random.Generator,
) -> CropPlan:
    """Training augmentation of one clip: scale jitter, random square crop, flip.

    As in [NL]: the short side is an integer, uniform over `short_side`, both ends included
    (uniform in size, not in its inverse as in PySlowFast); the long side keeps the aspect ratio,
    rounded down; the position of the crop is uniform over all that fit.

    Args:
        height: Of the upright frame, in pixels.
        width: Of the upright frame, in pixels.
        short_side: Smallest and largest short side after resizing, in pixels.
        crop_size: Side of the square crop, in pixels.
        flip_probability: Of a horizontal flip.
        rng: Source of all randomness.

    Raises:
        ValueError: The range is empty, the crop is larger than the smallest short side, or the
            probability is outside [0, 1].
    """
    smallest, largest = short_side
    if not 1 <= smallest <= largest:
        raise ValueError(f"short_side is {short_side}, must be (min, max) with 1 <= min <= max")
    if not 1 <= crop_size <= smallest:
        raise ValueError(
            f"crop_size is {crop_size}, must be in 1 ... {smallest}, the smallest short side; "
            "lower crop_size or raise short_side"
        )
    if not 0.0 <= flip_probability <= 1.0:
        raise ValueError(f"flip_probability is {flip_probability}, must be in 0 ... 1")
    side = int(rng.integers(smallest, largest, endpoint=True))
    resize_height, resize_width = _resized(height, width, side)
    return CropPlan(
        resize_height=resize_height,
        resize_width=resize_width,
        top=int(rng.integers(0, resize_height - crop_size, endpoint=True)),
        left=int(rng.integers(0, resize_width - crop_size, endpoint=True)),
        height=crop_size,
        width=crop_size,
        flip=bool(rng.random() < flip_probability),
    )


def evaluation_crops(
    height: int, width: int, *, short_side: int, mode: SpatialMode, crop_size: int | None = None
) -> tuple[CropPlan, list[tuple[int, int, int, int]]]:
    """The region of each frame to decode in testing, and the crops inside it.

    The region is decoded once; the crops are views of it::

        full          +-----------+     three_crop    +---+---+---+     center   . +---+ .
                      |           |     (long side)   | 1 | 2 | 3 |              . |   | .
                      +-----------+                   +---+---+---+              . +---+ .

    `full` is the whole frame, for fully convolutional testing. ([NL] also cuts frames longer than
    1.6 times their short side to that; here they are whole.) `three_crop` lays three
    squares along the long side at 0, s and 2 s with s = (long side - crop_size) // 2, as [NL] and
    mmaction2 do; neighbors may overlap. `center` is the middle square.

    Args:
        height: Of the upright frame, in pixels.
        width: Of the upright frame, in pixels.
        short_side: After resizing, in pixels.
        mode: As above.
        crop_size: Side of the squares, by default `short_side`; not used by `full`.

    Returns:
        The plan of the region, and `(top, left, height, width)` of each crop inside the region.

    Raises:
        ValueError: `mode` is unknown, or `crop_size` does not fit or would be ignored by `full`.
    """
    if mode not in get_args(SpatialMode):
        raise ValueError(f"mode is {mode!r}, must be one of {', '.join(get_args(SpatialMode))}")
    if short_side < 1:
        raise ValueError(f"short_side is {short_side}, must be at least 1")
    resize_height, resize_width = _resized(height, width, short_side)
    if mode == "full":
        if crop_size is not None:
            raise ValueError(f"mode full uses the whole frame; remove crop_size ({crop_size})")
        plan = CropPlan(resize_height, resize_width, 0, 0, resize_height, resize_width)
        return plan, [(0, 0, resize_height, resize_width)]

    size = short_side if crop_size is None else crop_size
    if not 1 <= size <= short_side:
        raise ValueError(f"crop_size is {size}, must be in 1 ... {short_side}, the short side")
    top = (resize_height - size) // 2
    left = (resize_width - size) // 2
    if mode == "center":
        return CropPlan(resize_height, resize_width, top, left, size, size), [(0, 0, size, size)]
    if resize_height > resize_width:
        plan = CropPlan(resize_height, resize_width, 0, left, 2 * top + size, size)
        return plan, [(i * top, 0, size, size) for i in range(3)]
    plan = CropPlan(resize_height, resize_width, top, 0, size, 2 * left + size)
    return plan, [(0, i * left, size, size) for i in range(3)]


def rand_augment(frames: np.ndarray, *, magnitude: int, rng: np.random.Generator) -> None:
    """RandAugment (Cubuk et al., arXiv:1909.13719) in place: two random operations.

    All frames of a clip get the same ones, with the same values.

    Args:
        frames: uint8 (T, H, W, 3).
        magnitude: 1 to 30, of the operations.
        rng: Source of all randomness.
    """
    # Imported here, since it takes each loader worker a second.
    from torchvision import tv_tensors  # noqa: PLC0415
    from torchvision.transforms import v2  # noqa: PLC0415

    augment = v2.RandAugment(num_ops=2, magnitude=magnitude)
    video = tv_tensors.Video(torch.from_numpy(frames).permute(0, 3, 1, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        frames[:] = augment(video).permute(0, 2, 3, 1).numpy()


def normalize_clips(
    clips_uint8: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`(x / 255 - mean) / std` per channel, on the device where the clips are.

    Args:
        clips_uint8: uint8 (N, C, T, H, W), in any memory format, which is kept.
        mean: One number per channel, for pixels in [0, 1].
        std: One number per channel, for pixels in [0, 1].
        dtype: Of the result; the arithmetic is in float32.
    """
    if clips_uint8.dtype != torch.uint8 or clips_uint8.ndim != 5:
        raise ValueError(
            "clips must be uint8 in shape (N, C, T, H, W), "
            f"got {clips_uint8.dtype} in shape {tuple(clips_uint8.shape)}"
        )
    channels = clips_uint8.shape[1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(
            f"mean {tuple(mean)} and std {tuple(std)} must have one number for each of the "
            f"{channels} channels, and std must be positive"
        )
    # x * scale + shift, in the one float32 copy that the conversion makes.
    # Not created on the device: that would wait for all work queued there.
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    scale, shift = (t.to(clips_uint8.device, non_blocking=True) for t in (scale, shift))
    clips = clips_uint8.to(torch.float32)
    clips = clips.mul_(scale.view(-1, 1, 1, 1)).add_(shift.view(-1, 1, 1, 1))
    return clips.to(dtype)


def _resized(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width when the short side is `short_side`; the long side is rounded down."""
    if height < 1 or width < 1:
        raise ValueError(f"the frame is {height}x{width}, must be at least 1x1")
    if height <= width:
        return short_side, width * short_side // height
    return height * short_side // width, short_side
