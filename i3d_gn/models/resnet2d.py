"""Image ResNets made of I3D's blocks, to train on ImageNet and inflate.

The network of [GN] section 4.1: torchvision's ResNet, with the stride in the 3x3 convolution.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from i3d_gn.models.blocks import Bottleneck, Kernel, NormFactory, StrideIn, make_stage
from i3d_gn.norm import make_norm


def conv2d(in_channels: int, out_channels: int, kernel: Kernel, stride: Kernel) -> nn.Conv2d:
    """A convolution over (H, W) from a kernel and a stride (1, H, W)."""
    assert kernel[0] == stride[0] == 1
    padding = (kernel[1] // 2, kernel[2] // 2)
    return nn.Conv2d(in_channels, out_channels, kernel[1:], stride[1:], padding, bias=False)


class ImageHead(nn.Module):
    """Average pooling and the linear classifier."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) to logits (N, K)."""
        return self.linear(features.mean((2, 3)))


class ResNet2d(nn.Module):
    """ResNet with bottleneck blocks, from images to logits.

    Parameters have the same names as in `I3D`, so that a checkpoint can be inflated.

    Args:
        depths: number of blocks in res2 to res5.
        norm: a name for `i3d_gn.norm.make_norm`, or a function from a number of channels to a
            layer for (N, C, H, W).
        num_classes: K.
        width: channels of conv1 and inner channels of res2; each stage doubles the latter.
        stride_in: which convolution of a stage's first block has the stride, `3x3` or `1x1`.
        zero_init_last_norm: initialize the last gamma of each block to 0 ([GN] section 4.1).
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        norm: str | NormFactory = "gn",
        num_classes: int = 1000,
        width: int = 64,
        stride_in: StrideIn = "3x3",
        zero_init_last_norm: bool = True,
    ) -> None:
        super().__init__()
        norm_factory = partial(make_norm, norm, spatial_dims=2) if isinstance(norm, str) else norm
        self.conv1 = conv2d(3, width, (1, 7, 7), (1, 2, 2))
        self.norm1 = norm_factory(width)
        self.pool1 = nn.MaxPool2d(3, 2, 1)
        self.res2, self.res3, self.res4, self.res5 = (
            make_stage(
                depth,
                width if i == 0 else 4 * width * 2 ** (i - 1),
                width * 2**i,
                temporal_kernels=(1,),
                spatial_stride=1 if i == 0 else 2,
                stride_in=stride_in,
                norm=norm_factory,
                conv=conv2d,
            )
            for i, depth in enumerate(depths)
        )
        self.head = ImageHead(4 * width * 8, num_classes)
        self._init_weights(zero_init_last_norm)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W) to logits (N, K)."""
        x = self.pool1(F.relu(self.norm1(self.conv1(images)), inplace=True))
        return self.head(self.res5(self.res4(self.res3(self.res2(x)))))

    def _init_weights(self, zero_init_last_norm: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_last_norm and isinstance(module, Bottleneck):
                gamma = getattr(module.norm3, "weight", None)
                if isinstance(gamma, nn.Parameter):
                    nn.init.zeros_(gamma)
        nn.init.normal_(self.head.linear.weight, std=0.01)
        nn.init.zeros_(self.head.linear.bias)


def resnet50(norm: str | NormFactory = "gn", num_classes: int = 1000, **options: Any) -> ResNet2d:
    """ResNet-50; `options` are those of `ResNet2d`. 25,557,032 parameters with 1000 classes."""
    return ResNet2d((3, 4, 6, 3), norm=norm, num_classes=num_classes, **options)


def resnet101(norm: str | NormFactory = "gn", num_classes: int = 1000, **options: Any) -> ResNet2d:
    """ResNet-101; `options` are those of `ResNet2d`."""
    return ResNet2d((3, 4, 23, 3), norm=norm, num_classes=num_classes, **options)


def resnet_tiny(
    norm: str | NormFactory = "gn", num_classes: int = 1000, **options: Any
) -> ResNet2d:
    """A narrow ResNet with one block per stage, for training on a CPU.

    32 groups do not divide the 16 channels of conv1, so `gn` means 8 groups here.
    """
    norm = partial(make_norm, "gn", num_groups=8) if norm == "gn" else norm
    return ResNet2d((1, 1, 1, 1), norm=norm, num_classes=num_classes, width=16, **options)


def resnet_small(
    norm: str | NormFactory = "gn", num_classes: int = 1000, **options: Any
) -> ResNet2d:
    """The image network that inflates to `i3d_small`; `gn` means 8 groups."""
    norm = partial(make_norm, "gn", num_groups=8) if norm == "gn" else norm
    return ResNet2d((1, 2, 2, 1), norm=norm, num_classes=num_classes, width=24, **options)


RESNETS = {make.__name__: make for make in (resnet50, resnet101, resnet_small, resnet_tiny)}
