"""SGD as in [NL], and the learning rate as a function of the step."""

import bisect
import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from i3d_gn.engine.recipe import Recipe
from i3d_gn.norm import GroupNorm

_NORM_LAYERS = (GroupNorm, _BatchNorm)


def build_sgd(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with a separate weight decay for gamma and beta of norm layers.

    [NL] decays weights by 1e-4 and norm parameters by 0; [GN] section 4.1 decays everything on
    ImageNet and does not say for Kinetics. The learning rate is set at every step by `set_lr`.

    Uses torch's fused kernel, which reads and writes everything once, except with loss scaling
    (fp16): there it has already changed the momentum of a step that `GradScaler` then skips
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
        {"params": others, "weight_decay": recipe.weight_decay},
        {"params": norm_parameters, "weight_decay": recipe.norm_weight_decay},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=0.0,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=recipe.precision != "fp16",
    )


def load_sgd_state(optimizer: torch.optim.SGD, state: dict[str, Any]) -> None:
    """Load `state`, which a run with another memory format or precision may have saved."""
    fused = [group["fused"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, value in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = value
    # The fused CPU kernel reads memory in storage order and ignores strides.
    for parameter, values in optimizer.state.items():
        momentum = values.get("momentum_buffer")
        if momentum is not None and momentum.stride() != parameter.stride():
            values["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(momentum)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate of step `step`, counted from 0.

    `recipe.lr` is for a global batch of `recipe.lr_batch_size` and scales linearly with the batch
    (Goyal et al., arXiv:1706.02677). Schedule "step" multiplies by 0.1 at every milestone, "cosine"
    decays to 0 over all steps. During warm-up the rate rises linearly to its schedule.
    """
    peak = recipe.lr * recipe.global_batch_size / recipe.lr_batch_size
    if recipe.schedule == "step":
        value = peak * 0.1 ** bisect.bisect_right(recipe.milestones, step)
    else:
        value = peak * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return value * min(1.0, (step + 1) / (recipe.warmup_steps + 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
