"""Fixtures for tests of networks."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_initialized(model: nn.Module) -> None:
    """Convolutions as He et al., gammas 1, those that end a block 0, biases 0."""
    for name, parameter in model.named_parameters():
        if "conv" in name:
            fan_out = parameter.shape[0] * parameter[0, 0].numel()
            assert parameter.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        elif name.endswith("norm3.weight"):
            assert torch.equal(parameter, torch.zeros_like(parameter))
        elif name.endswith("weight") and "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter))
    assert model.head.linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
