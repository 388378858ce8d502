"""From uint8 images in host memory to what an image network takes, on its device."""

import torch

from i3d_gn.device_clips import DeviceClips


class DeviceImages(DeviceClips):
    """Moves images to the device and normalises them there; arguments are `DeviceClips`'."""

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) on any device -> float (N, 3, H, W), channels_last."""
        return super().__call__(clips[:, None]).squeeze(2)
