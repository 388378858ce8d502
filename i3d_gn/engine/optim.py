"""SGD as in [NL], or AdamW, and the learning rate as a function of the step."""

import bisect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from i3d_gn.engine.recipe import Recipe
from i3d_gn.norm import GroupNorm

_NORM_LAYERS = (GroupNorm, _BatchNorm)


def build_optimizer(
    model: nn.Module, recipe: Recipe, lr_multiplier: Callable[[str], float] = lambda _: 1.0
) -> torch.optim.Optimizer:
    """SGD or AdamW with a separate weight decay for gamma and beta of norm layers.

    AdamW (Loshchilov & Hutter, arXiv:1711.05101) has PyTorch's betas of 0.9 and 0.999.

    [NL] decays weights by 1e-4 and norm parameters by 0; [GN] section 4.1 decays everything on
    ImageNet and does not say for Kinetics. The learning rate is set at every step by `set_lr`.

    Uses torch's fused kernel, which reads and writes everything once, except with loss scaling
    (fp16): there it has already changed the momentum of a step that `GradScaler` then skips
    (torch 2.11 to 2.14).

    Args:
        model: Its parameters that require a gradient are optimized.
        recipe: Optimizer, momentum, weight decay.
        lr_multiplier: Factor of the learning rate of a parameter, by its name.
    """
    norm_ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORM_LAYERS)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (lr_multiplier(name), id(parameter) in norm_ids)
            groups.setdefault(key, []).append(parameter)
    decay = {False: recipe.weight_decay, True: recipe.norm_weight_decay}
    param_groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": decay[is_norm],
            **({"lr_multiplier": multiplier} if multiplier != 1 else {}),
        }
        for (multiplier, is_norm), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    fused = recipe.precision != "fp16"
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(param_groups, lr=0.0, fused=fused)
    return torch.optim.SGD(
        param_groups, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load `state`, which a run with another memory format or precision may have saved."""
    fused = [group["fused"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, value in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = value
    # The fused CPU kernels read memory in storage order and ignore strides.
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if (
                isinstance(value, torch.Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                values[key] = torch.empty_like(parameter.detach()).copy_(value)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate of step `step`, counted from 0.

    `recipe.lr` is for a global batch of `recipe.lr_batch_size` and scales linearly with the batch
    (Goyal et al., arXiv:1706.02677). Schedule "step" multiplies by 0.1 at every milestone, "cosine"
    decays to 0 over all steps. During warm-up the rate rises linearly to its schedule,
    from the fraction `recipe.warmup_from` of it.
    """
    peak = recipe.lr * recipe.global_batch_size / recipe.lr_batch_size
    if recipe.schedule == "step":
        value = peak * 0.1 ** bisect.bisect_right(recipe.milestones, step)
    else:
        value = peak * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    warmed_up = min(1.0, (step + 1) / (recipe.warmup_steps + 1))
    return value * (recipe.warmup_from + (1 - recipe.warmup_from) * warmed_up)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times its multiplier if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)
