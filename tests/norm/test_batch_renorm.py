import numpy as np
import pytest
import torch
from torch import nn

from i3d_gn.engine.optim import build_optimizer
from i3d_gn.engine.recipe import Recipe
from i3d_gn.models import i3d_tiny
from i3d_gn.norm import BatchRenorm, make_norm


def algorithm_1(x, mu, sigma, gamma, beta, *, r_max, d_max, momentum, eps):
    """arXiv:1702.03275, Algorithm 1, in float64: the output and the updated averages."""
    axes = (0, *range(2, x.ndim))

    def by_channel(v):
        return v.reshape(1, -1, *(1,) * (x.ndim - 2))

    mean = x.mean(axes)
    std = np.sqrt(eps + ((x - by_channel(mean)) ** 2).mean(axes))
    r = np.clip(std / sigma, 1 / r_max, r_max)
    d = np.clip((mean - mu) / sigma, -d_max, d_max)
    normalized = (x - by_channel(mean)) / by_channel(std)
    y = by_channel(gamma) * (normalized * by_channel(r) + by_channel(d)) + by_channel(beta)
    return y, mu + momentum * (mean - mu), sigma + momentum * (std - sigma)


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 4, 2, 3, 3)])
def test_algorithm_1_over_several_batches(shape):
    generator = torch.Generator().manual_seed(0)
    eps = 0.1
    layer = BatchRenorm(4, eps=eps, momentum=0.3, r_max=1.5, d_max=0.5, schedule=None)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(4, generator=generator) + 0.5)
        layer.bias.copy_(torch.randn(4, generator=generator))
    gamma, beta = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    mu, sigma = np.zeros(4), np.sqrt(np.ones(4) + eps)
    for step in range(5):
        x = torch.randn(shape, generator=generator) * (1 + step) + step / 2
        expected, mu, sigma = algorithm_1(
            x.double().numpy(), mu, sigma, gamma, beta,
            r_max=1.5, d_max=0.5, momentum=0.3, eps=eps,
        )  # fmt: skip
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_mean.numpy(), mu, rtol=1e-5)
    np.testing.assert_allclose(layer.running_var.numpy(), sigma**2 - eps, rtol=1e-5)
    assert layer.num_batches_tracked == 5
    layer.eval()
    by_channel = (1, 4, *(1,) * (len(shape) - 2))
    mu, sigma, gamma, beta = (v.reshape(by_channel) for v in (mu, sigma, gamma, beta))
    expected = (x.double().numpy() - mu) / sigma * gamma + beta
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_treat_r_and_d_as_constants():
    layer = BatchRenorm(3, r_max=2.0, d_max=1.0, schedule=None).double()
    layer.running_mean.add_(0.5)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn_like(x)
    (grad,) = torch.autograd.grad((layer(x) * target).sum(), x)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    s = (var + 1e-5).sqrt()
    running_s = (1 + 1e-5) ** 0.5
    r = (s / running_s).clamp(0.5, 2).detach()
    d = ((mean - 0.5) / running_s).clamp(-1, 1).detach()
    (expected,) = torch.autograd.grad((((x - mean) / s * r + d) * target).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_schedule_starts_as_batch_norm_and_limits_grow():
    layer, batch_norm = BatchRenorm(4), nn.BatchNorm2d(4)
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 4 + 2
    torch.testing.assert_close(layer(x), batch_norm(x))
    # Ioffe, section 4: from step 5000, r_max grows to 3 at 40000 and d_max to 5 at 25000.
    for done, r_max, d_max in ((5000, 1, 0), (15000, 1 + 2 * 10 / 35, 2.5), (25000, 15 / 7, 5),
                               (40000, 3, 5), (90000, 3, 5)):  # fmt: skip
        layer.num_batches_tracked.fill_(done)
        assert [float(v) for v in layer.limits()] == pytest.approx([r_max, d_max])
    layer = BatchRenorm(4, r_max=3, d_max=5, schedule=(0, 4, 2))
    layer(x)
    assert [float(v) for v in layer.limits()] == [1.5, 2.5]


def test_without_corrections_equals_batch_norm():
    layer = BatchRenorm(4, r_max=1, d_max=0, schedule=None)
    x = torch.randn(8, 4, 3, 3) * 4 + 2
    for _ in range(2):
        torch.testing.assert_close(layer(x), nn.BatchNorm2d(4)(x))


def test_split_statistics():
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1
    split = make_norm("brn", 4, r_max=1.5, d_max=0.5, stats_batch_size=2)
    parts = []
    for part in x.split(2):
        worker = BatchRenorm(4, r_max=1.5, d_max=0.5, schedule=None)
        parts.append(worker(part))
        if len(parts) == 1:
            state = worker.state_dict()
    torch.testing.assert_close(split(x), torch.cat(parts))
    assert all(torch.equal(v, split.state_dict()[k]) for k, v in state.items())


def test_weight_decay_of_gamma_and_beta():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), BatchRenorm(4))
    groups = build_optimizer(model, Recipe(weight_decay=1e-4, norm_weight_decay=0.0)).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(1e-4, 1), (0.0, 2)]


def test_errors():
    with pytest.raises(ValueError, match=r"r_max=0\.5"):
        make_norm("brn", 4, r_max=0.5)
    with pytest.raises(ValueError, match=r"r_max=3\.0, d_max=-1"):
        BatchRenorm(4, d_max=-1)
    for schedule in ((5, 5, 9), (5, 9, 5), (-1, 5, 9)):
        with pytest.raises(ValueError, match=r"schedule=.*both ends after start"):
            make_norm("brn", 4, schedule=schedule)
    with pytest.raises(ValueError, match="r_max=2, d_max=None, schedule=None are for norm 'brn'"):
        make_norm("bn", 4, r_max=2)
    with pytest.raises(ValueError, match="stats_batch_size=0.*at least 1"):
        BatchRenorm(4, stats_batch_size=0)
    for shape in ((2, 5, 3, 3), (4,)):
        with pytest.raises(ValueError, match="C = 4"):
            BatchRenorm(4)(torch.zeros(shape))
    with pytest.raises(ValueError, match="3 samples is not a multiple of stats_batch_size=2"):
        BatchRenorm(4, stats_batch_size=2)(torch.zeros(3, 4, 3, 3))
    with pytest.raises(ValueError, match="batch of 0 samples"):
        BatchRenorm(4)(torch.empty(0, 4, 3, 3))
    with pytest.raises(ValueError, match=r"leave checkpoint_stages empty"):
        i3d_tiny("brn", 4, checkpoint_stages=["res3"])
