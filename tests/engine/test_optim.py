import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from i3d_gn.engine.optim import build_optimizer, learning_rate, load_optimizer_state, set_lr
from i3d_gn.engine.recipe import Recipe
from i3d_gn.models import i3d_tiny
from i3d_gn.norm import make_norm

RECIPE = Recipe(steps=400_000, milestones=(150_000, 300_000))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.01), (149_999, 0.01), (150_000, 1e-3), (299_999, 1e-3), (300_000, 1e-4)],
)
def test_step_schedule_of_the_baseline(step, expected):
    assert learning_rate(step, RECIPE) == pytest.approx(expected, rel=1e-12)


def test_linear_scaling_with_the_global_batch():
    assert learning_rate(0, replace(RECIPE, global_batch_size=32)) == pytest.approx(0.005)


def test_warmup_rises_linearly_to_the_schedule():
    rates = [learning_rate(step, replace(RECIPE, warmup_steps=4)) for step in range(7)]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01])


def test_warmup_can_start_at_a_fraction_of_the_rate():
    recipe = replace(RECIPE, warmup_steps=2, warmup_from=1 / 3, lr=0.9, milestones=(50,))
    rates = [learning_rate(step, recipe) for step in (0, 1, 2, 49, 50)]
    assert rates == pytest.approx([0.9 * 5 / 9, 0.9 * 7 / 9, 0.9, 0.9, 0.09])


def test_cosine_schedule_decays_from_peak_to_zero():
    recipe = Recipe(steps=100, schedule="cosine")
    assert learning_rate(0, recipe) == pytest.approx(0.01)
    assert learning_rate(50, recipe) == pytest.approx(0.005)
    assert learning_rate(99, recipe) == pytest.approx(
        0.005 * (1 + math.cos(math.pi * 0.99)), rel=1e-9
    )


@pytest.mark.parametrize("norm", ["gn", "bn", "ln", "in"])
def test_weight_decay_excludes_norm_parameters(norm):
    model = nn.Sequential(nn.Conv3d(3, 32, 1), make_norm(norm, 32), nn.Linear(32, 5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, Recipe(momentum=0.0, nesterov=False, weight_decay=0.5))
    set_lr(optimizer, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.startswith("1.") else 0.5
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_model_without_norm_layers_has_one_parameter_group():
    optimizer = build_optimizer(nn.Linear(2, 2), Recipe())
    assert len(optimizer.param_groups) == 1


def stepped(*, fused, channels_last, precision="fp32", steps=3):
    """Parameters, momentum and optimizer of a small network after some steps."""
    torch.manual_seed(0)
    model = i3d_tiny("gn", num_classes=5)
    if channels_last:
        model.to(memory_format=torch.channels_last_3d)
    optimizer = build_optimizer(model, Recipe())
    for group in optimizer.param_groups:
        group["fused"] = fused
    set_lr(optimizer, 0.05)
    clips = torch.rand(2, 3, 8, 32, 32)
    if channels_last:
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(clips).float().square().mean()
        loss.backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_sgd_equals_plain_sgd(channels_last, precision):
    fused, _ = stepped(fused=True, channels_last=channels_last, precision=precision)
    plain, _ = stepped(fused=False, channels_last=channels_last, precision=precision)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("channels_last", [False, True])
def test_sgd_state_loads_across_memory_formats(channels_last):
    model, optimizer = stepped(fused=True, channels_last=channels_last)
    torch.manual_seed(1)
    gradients = [torch.randn_like(p) for p in model.parameters()]

    other, other_optimizer = stepped(fused=True, channels_last=not channels_last, steps=0)
    other.load_state_dict(model.state_dict())
    load_optimizer_state(other_optimizer, copy.deepcopy(optimizer.state_dict()))
    for network, sgd in ((model, optimizer), (other, other_optimizer)):
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        sgd.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loaded_state_does_not_choose_the_kernel():
    """The fused one must not run under loss scaling, whatever the run that saved used."""
    saved = build_optimizer(nn.Linear(2, 2), Recipe(precision="fp32")).state_dict()
    optimizer = build_optimizer(nn.Linear(2, 2), Recipe(precision="fp16"))
    assert saved["param_groups"][0]["fused"]
    load_optimizer_state(optimizer, saved)
    assert not optimizer.param_groups[0]["fused"]


def test_skipped_fp16_step_leaves_momentum_unchanged():
    parameter = nn.Parameter(torch.ones(3))
    model = nn.ParameterList([parameter])
    optimizer = build_optimizer(model, Recipe(weight_decay=0.1, precision="fp16"))
    set_lr(optimizer, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter, torch.ones(3))
    assert not optimizer.state
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1 - 0.1 * 1.9 * 1.1))


def test_adamw_is_that_of_the_paper():
    """Loshchilov & Hutter, arXiv:1711.05101, algorithm 2, in float64."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    recipe = Recipe(optimizer="adamw", weight_decay=0.1)
    optimizer = build_optimizer(model, recipe)
    weight = model.weight.detach().clone()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, lr in enumerate((0.1, 0.05, 0.02), 1):
        gradient = torch.randn_like(weight)
        model.weight.grad = gradient.clone()
        set_lr(optimizer, lr)
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        weight -= lr * (update + 0.1 * weight)
        torch.testing.assert_close(model.weight.detach(), weight)


def test_loaded_adamw_state_has_the_strides_of_its_parameters():
    model = nn.Conv3d(4, 4, 3)
    recipe = Recipe(optimizer="adamw")
    optimizer = build_optimizer(model, recipe)
    model(torch.rand(1, 4, 4, 4, 4)).sum().backward()
    optimizer.step()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last_3d)
    resumed = build_optimizer(other, recipe)
    load_optimizer_state(resumed, optimizer.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            loaded = resumed.state[b][key]
            assert torch.equal(loaded, value)
            assert loaded.dim() == 0 or loaded.stride() == b.stride()


def test_multipliers_scale_the_learning_rate_of_a_parameter():
    model = nn.Sequential(nn.Linear(2, 2), make_norm("gn", 32), nn.Linear(2, 2))
    multipliers = {"0": 0.1, "1": 0.1, "2": 1.0}
    optimizer = build_optimizer(model, Recipe(), lambda name: multipliers[name[0]])
    set_lr(optimizer, 0.5)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.5 * multipliers[name[0]])
    plain = build_optimizer(model, Recipe())
    assert all("lr_multiplier" not in group for group in plain.param_groups)


def test_frozen_parameters_are_not_optimized():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = build_optimizer(model, Recipe()).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model[1].parameters()]
