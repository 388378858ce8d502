"""Group norm as a layer."""

from collections.abc import Callable
from typing import get_args

from torch import Tensor, nn

from i3d_gn.norm.axes import Over
from i3d_gn.norm.functional import group_norm, group_norm_relu_with_recompute


class GroupNorm(nn.GroupNorm):
    """Group normalization of (N, C, *), for any number of spatial dimensions ([GN] section 3).

    Statistics are over C / G channels and all positions of one sample: for video (N, C, T, H, W),
    over (C / G, T, H, W). The result does not depend on the batch size or the training mode.
    Parameters, their names and initial values (1 and 0) are those of `torch.nn.GroupNorm`, so that
    state dicts are interchangeable. Unlike that layer, it is accurate and preserves the memory
    format for channels_last tensors too, and computes statistics in at least float32.

    Args:
        num_groups: G, a divisor of `num_channels`. [GN] uses 32.
        num_channels: C.
        eps: added to the variance.
        affine: whether there are learned `weight` and `bias` per channel.
        over: `thw`, statistics over the whole clip; `hw`, over each frame by itself, so that the
            result does not depend on how a video is cut into clips; or `causal`, over each frame
            and those before it, so that it does not depend on later frames. The latter two need
            clips (N, C, T, H, W); for images (N, C, H, W), `hw` is `thw`.

    Raises:
        ValueError: G does not divide C, `over` is unknown, or the input has another number of
            channels or lacks an axis.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        over: Over = "thw",
    ) -> None:
        if num_groups < 1 or num_channels < 1 or num_channels % num_groups:
            raise ValueError(
                f"num_channels={num_channels} does not split into num_groups={num_groups} equal "
                "groups; choose one of the divisors of num_channels, or fix the number of channels "
                "per group (from_channels_per_group)"
            )
        if over not in get_args(Over):
            raise ValueError(f"over={over!r} is unknown; choose one of {', '.join(get_args(Over))}")
        super().__init__(num_groups, num_channels, eps=eps, affine=affine)
        self.over: Over = over

    @classmethod
    def from_channels_per_group(
        cls,
        channels_per_group: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        over: Over = "thw",
    ) -> "GroupNorm":
        """Fix the number of channels per group instead of G ([GN] Table 3, second half).

        Raises:
            ValueError: `channels_per_group` does not divide `num_channels`.
        """
        if channels_per_group < 1 or num_channels % channels_per_group:
            raise ValueError(
                f"num_channels={num_channels} is not a multiple of "
                f"channels_per_group={channels_per_group}; choose one of its divisors"
            )
        return cls(
            num_channels // channels_per_group, num_channels, eps=eps, affine=affine, over=over
        )

    def forward(
        self,
        input: Tensor,
        *,
        relu: bool = False,
        silu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalize (N, C, *), then optionally add `residual` and apply ReLU, or apply SiLU.

        The result has the input's shape, dtype and memory format. A residual has the input's shape
        and requires `relu`.
        """
        self._check(input)
        return group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            over=self.over,
            relu=relu,
            silu=silu,
            residual=residual,
        )

    def relu_with_recompute(self, input: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """`forward` with ReLU, and a function that recomputes the result.

        For inputs for which `uses_fused_kernels` is true, and not for `causal` statistics; see
        `group_norm_relu_with_recompute`.
        """
        self._check(input)
        return group_norm_relu_with_recompute(
            input, self.num_groups, self.weight, self.bias, self.eps, over=self.over
        )

    def extra_repr(self) -> str:
        """Options shown by `print`."""
        return super().extra_repr() + ("" if self.over == "thw" else f", over={self.over}")

    def _check(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_channels:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; this GroupNorm takes (N, C, *) with "
                f"C = {self.num_channels}"
            )
