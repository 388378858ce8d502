import math

import pytest
import torch
from torch import nn

from i3d_gn.norm import make_norm
from i3d_gn.optim import build_sgd, learning_rate, set_lr

RECIPE = {
    "steps": 400_000, "lr": 0.01, "lr_batch_size": 64, "global_batch_size": 64,
    "schedule": "step", "milestones": (150_000, 300_000), "warmup_steps": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.01), (149_999, 0.01), (150_000, 1e-3), (299_999, 1e-3), (300_000, 1e-4)],
)
def test_step_schedule_of_the_baseline(step, expected):
    assert learning_rate(step, **RECIPE) == pytest.approx(expected, rel=1e-12)


def test_linear_scaling_with_the_global_batch():
    assert learning_rate(0, **{**RECIPE, "global_batch_size": 32}) == pytest.approx(0.005)


def test_warm_up_reaches_the_schedule_and_not_beyond():
    rates = [learning_rate(step, **{**RECIPE, "warmup_steps": 4}) for step in range(7)]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01])


def test_cosine_falls_from_the_peak_to_zero():
    recipe = {**RECIPE, "schedule": "cosine", "milestones": (), "steps": 100}
    assert learning_rate(0, **recipe) == pytest.approx(0.01)
    assert learning_rate(50, **recipe) == pytest.approx(0.005)
    assert learning_rate(99, **recipe) == pytest.approx(
        0.005 * (1 + math.cos(math.pi * 0.99)), rel=1e-9
    )


@pytest.mark.parametrize("norm", ["gn", "bn", "ln", "in"])
def test_weight_decay_spares_norm_parameters_alone(norm):
    model = nn.Sequential(nn.Conv3d(3, 32, 1), make_norm(norm, 32), nn.Linear(32, 5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_sgd(
        model, momentum=0.0, nesterov=False, weight_decay=0.5, norm_weight_decay=0.0
    )
    set_lr(optimizer, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.startswith("1.") else 0.5
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_no_norm_layers_leave_one_group():
    optimizer = build_sgd(
        nn.Linear(2, 2), momentum=0.9, nesterov=True, weight_decay=0.1, norm_weight_decay=0.0
    )
    assert len(optimizer.param_groups) == 1
