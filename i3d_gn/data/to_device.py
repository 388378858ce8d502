"""From uint8 clips or images in host memory to the network's input, on its device."""

import contextlib
from typing import Literal

import torch

from i3d_gn.data.transforms import normalize_clips

Precision = Literal["fp32", "bf16", "fp16"]


def autocast(
    device: torch.device, precision: Precision
) -> contextlib.AbstractContextManager[object]:
    """The context in which a network runs in `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype)


class ToDevice:
    """Moves a batch to the device and normalizes it there.

    Args:
        device: The network's.
        mean, std: RGB in [0, 1]; they belong to the network's weights.
        precision: Of the network's arithmetic.
        channels_last: Whether clips come out in channels_last_3d or contiguous; images are always
            channels_last.
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

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """uint8 clips (N, T, H, W, 3) or images (N, H, W, 3), on any device -> float32, normalized.

        Returns:
            (N, 3, T, H, W), or (N, 3, H, W) for images.
        """
        if inputs.dim() == 4:
            return self._clips(inputs[:, None], channels_last=True).squeeze(2)
        return self._clips(inputs, channels_last=self.channels_last)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the network runs."""
        return autocast(self.device, self.precision)

    def _clips(self, clips: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
        clips = clips.to(self.device, non_blocking=True).permute(0, 4, 1, 2, 3)
        if not channels_last:
            clips = clips.contiguous()
        return normalize_clips(clips, self.mean, self.std, dtype=torch.float32)
