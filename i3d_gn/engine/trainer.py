"""One optimiser step, one validation, one re-estimation of BN's statistics."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from i3d_gn.data.batches import ClipBatch, Stream
from i3d_gn.data.to_device import DeviceClips
from i3d_gn.engine.command import NonFiniteLossError
from i3d_gn.engine.distributed import copy_from_main, sum_over_world
from i3d_gn.engine.metrics import RunningMetrics


class Trainer:
    """Takes optimiser steps; nothing in a step waits for the device.

    Args:
        model: The network, wrapped in DDP where there are several processes.
        optimizer: Its learning rate is set by the caller.
        to_device: Brings clips to the device.
        clips_per_gpu: Clips of a full micro-batch.
        micro_batches: Micro-batches of a step in this process.
        rank, world_size: This process among all.
        seed: Seeds dropout, with the step and the micro-batch.
        clip_grad_norm: Largest norm of the gradient, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        to_device: DeviceClips,
        clips_per_gpu: int,
        micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        clip_grad_norm: float | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.to_device = to_device
        self.clips_per_gpu = clips_per_gpu
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.clip_grad_norm = clip_grad_norm
        self.scaler = torch.amp.GradScaler(
            to_device.device.type, enabled=to_device.precision == "fp16"
        )
        self.metrics = RunningMetrics(to_device.device)
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=to_device.device)

    def step(self, step: int, batches: Iterator[ClipBatch]) -> list[str]:
        """Step number `step` from the next micro-batches; returns the lines of broken clips.

        The gradient is that of the loss summed over the global batch and divided by its size;
        a clip that could not be decoded contributes nothing.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        broken: list[str] = []
        for turn, batch in enumerate(itertools.islice(batches, self.micro_batches)):
            self._seed_dropout(step, turn)
            last = turn == self.micro_batches - 1
            with self._gradients_synchronised(last):
                loss = self._forward(batch)
                self.scaler.scale(loss / self.micro_batches).backward()
            bad = (self._first_bad_step < 0) & ~torch.isfinite(loss.detach())
            self._first_bad_step = torch.where(bad, step, self._first_bad_step)
            broken += batch.broken
        if self.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return broken

    def check_finite(self, *, parameters: bool = False) -> None:
        """Stop a diverged run. Waits for the device, so it is called when logging and saving.

        Raises:
            NonFiniteLossError: some loss (or, on request, some parameter) is not finite.
        """
        bad_step = self._first_bad_step.clone()
        if dist.is_initialized():
            dist.all_reduce(bad_step, op=dist.ReduceOp.MAX)
        if int(bad_step) >= 0:
            raise NonFiniteLossError(f"the loss is not finite at step {int(bad_step) + 1}")
        if parameters:
            finite = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()])
            if not bool(finite.all()):
                raise NonFiniteLossError("a parameter is not finite though the loss still is")

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides network and optimiser; called by all processes."""
        return {"scaler": self.scaler.state_dict(), "metrics": self.metrics.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.scaler.load_state_dict(state["scaler"])
        if self.rank == 0:  # the sums are already those of all processes
            self.metrics.load_state(state["metrics"])

    def _forward(self, batch: ClipBatch) -> torch.Tensor:
        """The loss of a micro-batch over its full size; counts it in `metrics`."""
        device = self.to_device.device
        clips = self.to_device(batch.clips)
        labels = batch.labels.to(device, non_blocking=True)
        weights = batch.weights.to(device, non_blocking=True)
        with self.to_device.autocast():
            logits = self.model(clips)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        self.metrics.update(losses, logits, labels, weights, len(batch.broken))
        return (losses * weights).sum() / self.clips_per_gpu

    def _gradients_synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _seed_dropout(self, step: int, turn: int) -> None:
        """The micro-batch, not the process, decides: one GPU drops what eight would."""
        micro_batch = turn * self.world_size + self.rank
        sequence = np.random.SeedSequence((self.seed, Stream.DROPOUT, step, micro_batch))
        torch.manual_seed(int(sequence.generate_state(1)[0]))


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[ClipBatch], to_device: DeviceClips
) -> tuple[dict[str, float], list[str]]:
    """Loss and accuracy over clips ([GN] Fig. 7: one clip a video, augmented as in training).

    Running statistics are worker 0's in all processes, as a checkpoint has them.

    Returns `RunningMetrics.read_and_reset()` over all processes, and this one's broken clips.
    """
    model.eval()
    copy_from_main(model.buffers())
    metrics = RunningMetrics(to_device.device)
    broken: list[str] = []
    for batch in batches:
        labels = batch.labels.to(to_device.device)
        with to_device.autocast():
            logits = model(to_device(batch.clips)).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        metrics.update(
            losses, logits, labels, batch.weights.to(to_device.device), len(batch.broken)
        )
        broken += batch.broken
    return metrics.read_and_reset(), broken


def batch_norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers whose running statistics training updates."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


@torch.no_grad()
def reestimate_bn_statistics(
    model: nn.Module, batches: Iterable[ClipBatch], to_device: DeviceClips
) -> list[str]:
    """Precise BN: the running statistics become those of all `batches` together.

    The exponential average lags behind the weights, so [NL] re-estimates before testing. Mean and
    variance are the population's (Wu & Johnson, arXiv:2105.07576, appendix): between batches too,
    which matters when a batch is two clips. Batches count alike, but for those without any clip.

    Returns this process's broken clips.
    """
    layers = batch_norm_layers(model)
    batches_tracked = [
        None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
        for layer in layers
    ]
    moments = [
        torch.zeros(2, layer.num_features, dtype=torch.float64, device=to_device.device)
        for layer in layers
    ]

    def adds_to(total: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def add_moments(_layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            (x,) = inputs
            axes = [axis for axis in range(x.dim()) if axis != 1]
            variance, mean = torch.var_mean(x.float(), dim=axes, correction=0)
            total.add_(torch.stack([mean, variance + mean**2]))

        return add_moments

    hooks = [
        layer.register_forward_pre_hook(adds_to(total))
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
            model(to_device(batch.clips))
        num_batches += 1
    for hook in hooks:
        hook.remove()
    sum_over_world(num_batches)
    for layer, total, tracked in zip(layers, moments, batches_tracked, strict=True):
        mean, square = sum_over_world(total) / num_batches
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(square - mean**2)
        if layer.num_batches_tracked is not None and tracked is not None:
            layer.num_batches_tracked.copy_(tracked)  # Batch Renorm's schedule goes by it
    return broken
