"""A trained network as one module, from the pixels of clips to the scores of classes."""

from typing import Literal

import torch
from torch import Tensor, nn

Input = Literal["uint8", "float"]


class ClipClassifier(nn.Module):
    """Normalization, network and average over locations: the scores that testing gives to clips.

    The scores of a video are the mean of those of its clips and crops.

    Args:
        network: `forward(clips, window=...)`, as `I3D`.
        mean: RGB in [0, 1].
        std: RGB in [0, 1].
        window: Rows and columns of the network's sliding window, see `I3D.forward`; None for a
            network that averages the whole map.
        average: `softmax`: probabilities; `logits`: logits.
        input: What `forward` takes.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        window: tuple[int, int] | None,
        average: str,
        input: Input = "uint8",
    ) -> None:
        super().__init__()
        self.network = network
        # x * scale + shift, as `normalize_clips` computes it.
        scale, shift = (
            [1 / (255 * s) for s in std],
            [-m / s for m, s in zip(mean, std, strict=True)],
        )
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1, 1), persistent=False)
        self.window = window
        self.average = average
        self.input: Input = input

    def forward(self, clips: Tensor) -> Tensor:
        """Classify clips.

        Args:
            clips: Pixels, uint8 (N, T, H, W, 3), RGB; or with `input="float"` float32
                (N, 3, T, H, W), normalized.

        Returns:
            Scores (N, K).
        """
        if self.input == "uint8":
            scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
            clips = clips.permute(0, 4, 1, 2, 3).float() * scale + shift
        logits = self.network(clips.contiguous(), window=self.window).float()
        per_location = logits.softmax(dim=1) if self.average == "softmax" else logits
        return per_location if self.window is None else per_location.mean(dim=(2, 3, 4))
