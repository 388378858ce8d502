"""Video networks of torchvision, with any norm of this package."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import video

from i3d_gn.models.network import AdaptedNetwork
from i3d_gn.norm import replace_norm

TorchvisionName = Literal["r3d_18", "mc3_18", "r2plus1d_18", "s3d"]


class _SlidingAverage(nn.Module):
    """S3D's pooling over 2x7x7 positions, or over fewer where the map of a small clip is smaller.

    torchvision's own fails there. The two are the same from 14 frames of 224x224 pixels on.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W), averaged over windows."""
        window = tuple(min(most, n) for most, n in zip((2, 7, 7), x.shape[2:], strict=True))
        return F.avg_pool3d(x, window, stride=1)


def torchvision_network(
    name: TorchvisionName, *, num_classes: int, dropout: float, norm: str, **norm_options: Any
) -> AdaptedNetwork:
    """A network of `torchvision.models.video`, randomly initialized.

    Args:
        name: The function that makes it.
        num_classes: K.
        dropout: Before the classifier; 0 in torchvision's ResNets, 0.2 in S3D.
        norm: A name for `replace_norm`.
        norm_options: For `replace_norm`.

    Raises:
        ValueError: An option does not apply to the norm.
    """
    if name == "s3d":
        net = video.s3d(num_classes=num_classes, dropout=dropout)
        net.avgpool = _SlidingAverage()  # type: ignore[assignment]
        stages = tuple(f"features.{i}" for i in range(len(net.features)))
        adapted = AdaptedNetwork(net, classifier="classifier.1", channel_axis=1, stages=stages)
    else:
        net = getattr(video, name)(num_classes=num_classes)
        net.avgpool = nn.Sequential(net.avgpool, nn.Dropout(dropout))
        stages = ("stem", "layer1", "layer2", "layer3", "layer4")
        adapted = AdaptedNetwork(net, classifier="fc", channel_axis=1, stages=stages)
    replace_norm(net, norm, copy_affine=True, **norm_options)
    return adapted
