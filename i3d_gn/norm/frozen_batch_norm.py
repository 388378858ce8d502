"""Batch norm with fixed statistics and affine parameters."""

from typing import Any

import torch
from torch import Tensor, nn

from i3d_gn.norm.split_batch_norm import check_channels


class FrozenBatchNorm(nn.Module):
    """BN* of [GN] section 4.2: a fixed affine map per channel of (N, C, *).

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias. All four are buffers of shape
    (C,) with batch norm's names, as in detectron2 `layers/batch_norm.py`, so that the state dict of
    a batch norm can be loaded. No activation is saved for backward, as the gradient does not depend
    on x.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_channels))
        self.register_buffer("bias", torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, *), computed in at least float32 and returned in x's dtype.

        Raises:
            ValueError: x has another number of channels.
        """
        check_channels(x, self.num_channels)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        by_channel = (1, -1, *(1,) * (x.dim() - 2))
        return torch.addcmul(shift.view(by_channel), x, scale.view(by_channel)).to(x.dtype)

    def reset_parameters(self) -> None:
        """Reset to the identity, up to eps."""
        for buffer, value in (
            (self.weight, 1.0),
            (self.bias, 0.0),
            (self.running_mean, 0.0),
            (self.running_var, 1.0),
        ):
            buffer.fill_(value)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Batch norm counts its batches; a frozen one does not.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Options shown by `print`."""
        return f"{self.num_channels}, eps={self.eps}"
