"""Precise BN: running statistics of batch norm re-estimated over many batches before validation."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from i3d_gn.data.batches import Batch
from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.distributed import all_reduce_sum


def get_bn_modules(model: nn.Module) -> list[_BatchNorm]:
    """The layers whose running statistics training updates: those of frozen stages stay."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and (layer.weight is None or layer.weight.requires_grad)
    ]


@torch.no_grad()
def update_bn_stats(model: nn.Module, batches: Iterable[Batch], to_device: ToDevice) -> list[str]:
    """Set the running statistics to those of all `batches` together, over all ranks.

    The exponential average lags behind the weights, so [NL] re-estimates it before testing. Mean
    and variance are those of the population (Wu & Johnson, arXiv:2105.07576, appendix), including
    the variance between batches, which matters when a batch is two clips. Every batch has the same
    weight; batches without a decodable sample are skipped.

    Returns:
        One line for each sample of this rank that failed to decode.
    """
    layers = get_bn_modules(model)
    batches_tracked = [
        None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
        for layer in layers
    ]
    moments = [
        torch.zeros(2, layer.num_features, dtype=torch.float64, device=to_device.device)
        for layer in layers
    ]
    hooks = [
        layer.register_forward_pre_hook(_adds_moments_to(total))
        for layer, total in zip(layers, moments, strict=True)
    ]
    model.train()
    num_batches = torch.zeros((), dtype=torch.float64, device=to_device.device)
    broken: list[str] = []
    for batch in batches:
        broken += batch.broken
        if not batch.weights.any():
            continue
        with to_device.autocast():
            model(to_device(batch.inputs))
        num_batches += 1
    for hook in hooks:
        hook.remove()
    all_reduce_sum(num_batches)
    for layer, total, tracked in zip(layers, moments, batches_tracked, strict=True):
        mean, square = all_reduce_sum(total) / num_batches
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(square - mean**2)
        if layer.num_batches_tracked is not None and tracked is not None:
            layer.num_batches_tracked.copy_(tracked)  # the schedule of Batch Renorm depends on it
    return broken


def _adds_moments_to(total: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
    """A pre-hook that adds mean and mean square of a layer's input (N, C, *) to total (2, C)."""

    def add_moments(_layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (x,) = inputs
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x.float(), dim=axes, correction=0)
        total.add_(torch.stack([mean, variance + mean**2]))

    return add_moments
