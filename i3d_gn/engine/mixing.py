"""Mixup and CutMix: samples of a micro-batch mixed with one another, and their labels alike."""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


class MixSamples:
    """Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899).

    One of them per micro-batch, each as likely if both are given; each sample is mixed with the one
    before it, in one ratio, and CutMix cuts the same window out of all frames. Random numbers are
    those of torch's generator of the CPU, which the trainer seeds by step and micro-batch: the
    result depends on neither workers nor ranks.

    Args:
        num_classes: K.
        mixup: Alpha of the Beta distribution of the ratio; 0: no mixup.
        cutmix: The same for CutMix.
    """

    def __init__(self, num_classes: int, *, mixup: float, cutmix: float) -> None:
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.kinds = [kind(alpha=a, num_classes=num_classes) for kind, a in kinds if a > 0]

    def __call__(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix clips (N, C, T, H, W), in place, with labels (N,); also returns targets (N, K)."""
        kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
        mixed, targets = kind(tv_tensors.Video(clips), labels)
        return clips.copy_(mixed.as_subclass(Tensor)), targets
