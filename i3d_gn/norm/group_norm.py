"""The group norm layer."""

from collections.abc import Callable

from torch import Tensor, nn

from i3d_gn.norm.functional import group_norm, group_norm_relu_with_again


class GroupNorm(nn.GroupNorm):
    """Group normalisation of (N, C, *), any number of spatial dimensions ([GN] section 3).

    Statistics are over C / G channels and all positions of one sample: with video (N, C, T, H, W),
    over (C / G, T, H, W). Neither training mode nor batch size matter. Parameters, their names and
    the initial values (1 and 0) are those of `torch.nn.GroupNorm`, so state dicts exchange; unlike
    it, the result is right and the memory format kept for channels_last tensors too, and
    statistics are in float32 at least.

    Args:
        num_groups: G, a divisor of `num_channels`. [GN] uses 32.
        num_channels: C.
        eps: added to the variance.
        affine: whether to scale and shift by learned per-channel `weight` and `bias`.

    Raises:
        ValueError: G does not divide C, or an input has another number of channels.
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True
    ) -> None:
        if num_groups < 1 or num_channels < 1 or num_channels % num_groups:
            raise ValueError(
                f"num_channels={num_channels} does not split into num_groups={num_groups} equal "
                "groups; choose num_groups among the divisors of num_channels, or a number of "
                "channels per group (from_channels_per_group)"
            )
        super().__init__(num_groups, num_channels, eps=eps, affine=affine)

    @classmethod
    def from_channels_per_group(
        cls, channels_per_group: int, num_channels: int, eps: float = 1e-5, affine: bool = True
    ) -> "GroupNorm":
        """Fix the size of a group in place of their number ([GN] Table 3, second half).

        Raises:
            ValueError: `channels_per_group` does not divide `num_channels`.
        """
        if channels_per_group < 1 or num_channels % channels_per_group:
            raise ValueError(
                f"num_channels={num_channels} is no multiple of "
                f"channels_per_group={channels_per_group}; choose one of its divisors"
            )
        return cls(num_channels // channels_per_group, num_channels, eps=eps, affine=affine)

    def forward(
        self, input: Tensor, *, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise (N, C, *), add `residual`, apply ReLU; the latter two on request.

        Same shape, dtype and memory format out. A residual, of the input's shape, needs `relu`.
        """
        self._check(input)
        return group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            relu=relu,
            residual=residual,
        )

    def relu_with_again(self, input: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """`forward` with ReLU, and a function that computes the result once more.

        For inputs of which `uses_fused_kernels` is true; see `group_norm_relu_with_again`.
        """
        self._check(input)
        return group_norm_relu_with_again(input, self.num_groups, self.weight, self.bias, self.eps)

    def _check(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_channels:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; this GroupNorm takes (N, C, *) with "
                f"C = {self.num_channels}"
            )
