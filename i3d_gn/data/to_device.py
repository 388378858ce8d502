"""From uint8 clips in host memory to what a network takes, on its device."""

import contextlib
from typing import Literal

import torch

from i3d_gn.data.transforms import normalize_clips

Precision = Literal["fp32", "bf16", "fp16"]


class DeviceClips:
    """Moves clips to the device and normalises them there.

    Args:
        device: Where the network is.
        mean, std: RGB of a 0..1 range; they belong to the network's weights.
        precision: Of the network's arithmetic.
        channels_last: Whether clips come out channels_last_3d, or contiguous.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        precision: Precision,
        channels_last: bool = True,
    ) -> None:
        self.device = device
        self.mean = mean
        self.std = std
        self.precision: Precision = precision
        self.channels_last = channels_last

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        """uint8 (N, T, H, W, 3) on any device -> float (N, 3, T, H, W)."""
        clips = clips.to(self.device, non_blocking=True).permute(0, 4, 1, 2, 3)
        if not self.channels_last:
            clips = clips.contiguous()
        return normalize_clips(clips, self.mean, self.std, dtype=torch.float32)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the network runs."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype=dtype)


class DeviceImages(DeviceClips):
    """Moves images to the device and normalises them there; arguments are `DeviceClips`'."""

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) on any device -> float (N, 3, H, W), channels_last."""
        return super().__call__(clips[:, None]).squeeze(2)
