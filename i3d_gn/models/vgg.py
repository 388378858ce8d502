"""VGG-16, optionally with a normalization layer after each convolution ([GN] section 4.1)."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from i3d_gn.models.blocks import NormFactory
from i3d_gn.norm import make_norm

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, number of convolutions)


class ConvNormRelu(nn.Module):
    """A 3x3 convolution with bias, normalization and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H, W)."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


class VGG16(nn.Module):
    """VGG-16, from images to logits; 138,357,544 parameters without norms, for 1000 classes.

    Args:
        norm: a name for `i3d_gn.norm.make_norm`, or a function from a number of channels to a
            layer for (N, C, H, W).
        num_classes: K.
        dropout: probability after the two hidden linear layers.
    """

    def __init__(
        self, norm: str | NormFactory = "gn", num_classes: int = 1000, *, dropout: float = 0.5
    ) -> None:
        super().__init__()
        norm_factory = partial(make_norm, norm, spatial_dims=2) if isinstance(norm, str) else norm
        self.stage_layers: list[list[str]] = []
        in_channels = 3
        for stage, (channels, num_convs) in enumerate(STAGES, 1):
            self.stage_layers.append([f"conv{stage}_{i}" for i in range(1, num_convs + 1)])
            for name in self.stage_layers[-1]:
                self.add_module(name, ConvNormRelu(in_channels, channels, norm_factory))
                in_channels = channels
        self.fc6 = nn.Linear(512 * 7 * 7, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout = nn.Dropout(dropout)
        self._init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W), at least 32 x 32, to logits (N, K)."""
        x = images
        for names in self.stage_layers:
            for name in names:
                x = self.get_submodule(name)(x)
            x = F.max_pool2d(x, 2)
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)  # the identity at 224 x 224
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.dropout(F.relu(self.fc7(x)))
        return self.fc8(x)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
