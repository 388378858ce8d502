"""Batch Renormalization (Ioffe 2017, arXiv:1702.03275)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from i3d_gn.norm.split_batch_norm import check_channels, check_splits, check_stats_batch_size


class BatchRenorm(_BatchNorm):
    """Batch norm corrected toward its running statistics (arXiv:1702.03275, Algorithm 1).

    In training, for a batch with mean m and s = sqrt(var + eps), var the biased variance::

        y = ((x - m) / s * r + d) * weight + bias
        r = clip(s / running_s, 1 / r_max, r_max),  d = clip((m - running_m) / running_s, +-d_max)

    where no gradient flows through r and d, and running_m and running_s are exponential averages of
    m and s. In evaluation y = (x - running_m) / running_s * weight + bias. The buffers have the
    names of batch norm's, with `running_var` = running_s^2 - eps, so that state dicts are
    interchangeable.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the averages; 0.01 in the paper.
        r_max, d_max: largest corrections; r_max = 1, d_max = 0 is batch norm. [GN] section 4.1
            uses 1.5 and 0.5 for small batches, Ioffe 3 and 5.
        schedule: (start, r_end, d_end) in training batches: batch norm until `start`, then the
            limits grow linearly, r_max until `r_end` and d_max until `d_end`. None: constant
            limits.
        stats_batch_size: None, or n to compute statistics over n samples at a time, as in
            `SplitBatchNorm`.

    Raises:
        ValueError: a limit, the schedule or n is out of range; in training, the batch is empty or
            not a multiple of n.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        schedule: tuple[int, int, int] | None = (5000, 40_000, 25_000),
        stats_batch_size: int | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        if r_max < 1 or d_max < 0:
            raise ValueError(f"r_max={r_max}, d_max={d_max}; r_max is at least 1, d_max at least 0")
        if schedule is not None and not 0 <= schedule[0] < min(schedule[1:]):
            raise ValueError(
                f"schedule={schedule}; give (start, r_end, d_end) with both ends after start"
            )
        if stats_batch_size is not None:
            check_stats_batch_size(stats_batch_size)
        self.r_max = r_max
        self.d_max = d_max
        self.schedule = schedule
        self.stats_batch_size = stats_batch_size

    def limits(self) -> tuple[Tensor, Tensor]:
        """r_max and d_max at this point of the schedule, as tensors on the device."""
        assert self.num_batches_tracked is not None
        done = self.num_batches_tracked.to(torch.float32)
        if self.schedule is None:
            return torch.full_like(done, self.r_max), torch.full_like(done, self.d_max)
        start, r_end, d_end = self.schedule
        r_progress = ((done - start) / (r_end - start)).clamp(0, 1)
        d_progress = ((done - start) / (d_end - start)).clamp(0, 1)
        return 1 + (self.r_max - 1) * r_progress, self.d_max * d_progress

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *)."""
        self._check_input_dim(input)
        running_mean, running_var = self.running_mean, self.running_var
        assert running_mean is not None
        assert running_var is not None
        if not self.training:
            return F.batch_norm(
                input, running_mean, running_var, self.weight, self.bias, eps=self.eps
            )
        if len(input) == 0:
            raise ValueError("a batch of 0 samples has no statistics; skip it in training")
        size = self.stats_batch_size or len(input)
        check_splits(input, size)
        r_max, d_max = self.limits()
        running_std = (running_var + self.eps).sqrt()
        outputs, first = [], None
        for samples in input.split(size):
            with torch.no_grad():
                axes = [axis for axis in range(samples.dim()) if axis != 1]
                variance, mean = torch.var_mean(
                    samples.to(running_mean.dtype), dim=axes, correction=0
                )
                std = (variance + self.eps).sqrt()
                r = torch.clamp(std / running_std, 1 / r_max, r_max)
                d = torch.clamp((mean - running_mean) / running_std, -d_max, d_max)
                first = (mean, std) if first is None else first
            # The gradient is batch norm's: r and d are constants in its affine part.
            outputs.append(
                F.batch_norm(
                    samples,
                    None,
                    None,
                    self.weight * r,
                    self.weight * d + self.bias,
                    training=True,
                    eps=self.eps,
                )
            )
        assert first is not None
        self._update(*first, running_mean, running_var, running_std)
        return torch.cat(outputs)

    @torch.no_grad()
    def _update(
        self, mean: Tensor, std: Tensor, running_mean: Tensor, running_var: Tensor, old_std: Tensor
    ) -> None:
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        running_mean.lerp_(mean, self.momentum)
        running_var.copy_(torch.lerp(old_std, std, self.momentum) ** 2 - self.eps)
        self.num_batches_tracked.add_(1)

    def _check_input_dim(self, input: Tensor) -> None:
        check_channels(input, self.num_features)

    def extra_repr(self) -> str:
        """Options shown by `print`."""
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, "
            f"schedule={self.schedule}, stats_batch_size={self.stats_batch_size}"
        )
