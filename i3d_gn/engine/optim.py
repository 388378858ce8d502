"""SGD as in [NL], and the learning rate as a function of the step."""

import bisect
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from i3d_gn.norm import GroupNorm

_NORM_LAYERS = (GroupNorm, _BatchNorm)


def build_sgd(
    model: nn.Module,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    norm_weight_decay: float,
    loss_scaling: bool = False,
) -> torch.optim.SGD:
    """SGD whose weight decay on norm layers' gamma and beta is set apart.

    [NL] decays weights by 1e-4 and norm parameters by 0; [GN] section 4.1 decays everything on
    ImageNet and does not say for Kinetics. The learning rate is set at every step by `set_lr`.

    torch's fused kernel, which reads and writes everything once, takes the steps, but not with
    `loss_scaling`: a step that the `GradScaler` then calls off has changed the momentum already
    (torch 2.11 to 2.14).
    """
    norm_parameters = [
        parameter
        for module in model.modules()
        if isinstance(module, _NORM_LAYERS)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    ]
    norm_ids = {id(parameter) for parameter in norm_parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in norm_ids]
    groups = [
        {"params": others, "weight_decay": weight_decay},
        {"params": norm_parameters, "weight_decay": norm_weight_decay},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=0.0,
        momentum=momentum,
        nesterov=nesterov,
        fused=not loss_scaling,
    )


def load_sgd_state(optimizer: torch.optim.SGD, state: dict[str, Any]) -> None:
    """Go on from `state`, written by a run whose tensors may have had another memory format."""
    fused = [group["fused"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, value in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = value
    # The fused kernel on a CPU takes memory as it lies, without a look at strides.
    for parameter, values in optimizer.state.items():
        momentum = values.get("momentum_buffer")
        if momentum is not None and momentum.stride() != parameter.stride():
            values["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(momentum)


def learning_rate(
    step: int,
    *,
    steps: int,
    lr: float,
    lr_batch_size: int,
    global_batch_size: int,
    schedule: Literal["step", "cosine"],
    milestones: Sequence[int],
    warmup_steps: int,
) -> float:
    """Learning rate of step `step`, counted from 0.

    `lr` holds at a global batch of `lr_batch_size` and scales linearly with the batch (Goyal et
    al., arXiv:1706.02677). `step` multiplies by 0.1 at every milestone; `cosine` falls to 0 over
    `steps`. During warm-up the rate rises linearly to its schedule.
    """
    peak = lr * global_batch_size / lr_batch_size
    if schedule == "step":
        value = peak * 0.1 ** bisect.bisect_right(milestones, step)
    else:
        value = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
    return value * min(1.0, (step + 1) / (warmup_steps + 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
