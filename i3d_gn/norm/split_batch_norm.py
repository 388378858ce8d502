"""Batch norm of several workers simulated on one device: statistics over n samples at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class SplitBatchNorm(_BatchNorm):
    """Batch norm with statistics over `stats_batch_size` samples of (k * n, C, *) at a time.

    In training, one device with a batch of k * n samples computes what k workers with n samples
    each would compute, where sample i belongs to worker i // n. Running statistics are those of
    worker 0, as in data-parallel training. The batch-size experiments of [GN] (Tables 2 and 8,
    Figs. 1, 5 and 7) thus run on one device. In evaluation it is batch norm; state dicts are
    interchangeable.

    Args:
        num_features: C.
        stats_batch_size: n.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.

    Raises:
        ValueError: n is less than 1, or the input has another number of channels; in training, the
            batch is not a multiple of n.
    """

    def __init__(
        self, num_features: int, stats_batch_size: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        check_stats_batch_size(stats_batch_size)
        self.stats_batch_size = stats_batch_size

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (k * n, C, *)."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        check_splits(input, self.stats_batch_size)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        assert momentum is not None
        return torch.cat(
            [
                F.batch_norm(
                    samples,
                    self.running_mean if worker == 0 else None,
                    self.running_var if worker == 0 else None,
                    self.weight,
                    self.bias,
                    training=True,
                    momentum=momentum,
                    eps=self.eps,
                )
                for worker, samples in enumerate(input.split(self.stats_batch_size))
            ]
        )

    def _check_input_dim(self, input: Tensor) -> None:
        check_channels(input, self.num_features)

    def extra_repr(self) -> str:
        """Options shown by `print`."""
        return f"{super().extra_repr()}, stats_batch_size={self.stats_batch_size}"


def check_channels(input: Tensor, num_features: int) -> None:
    """Raise a ValueError unless the input has shape (N, C, *) with C = num_features."""
    if input.dim() < 2 or input.shape[1] != num_features:
        raise ValueError(
            f"input has shape {tuple(input.shape)}; this layer takes (N, C, *) with "
            f"C = {num_features}"
        )


def check_stats_batch_size(stats_batch_size: int) -> None:
    """Raise a ValueError unless it is positive."""
    if stats_batch_size < 1:
        raise ValueError(f"stats_batch_size={stats_batch_size}; it must be at least 1")


def check_splits(input: Tensor, stats_batch_size: int) -> None:
    """Raise a ValueError unless the batch splits into equal parts of `stats_batch_size`."""
    if len(input) % stats_batch_size:
        raise ValueError(
            f"a batch of {len(input)} samples is not a multiple of "
            f"stats_batch_size={stats_batch_size}; change one of them"
        )
