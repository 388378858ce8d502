import numpy as np
import pytest
import torch
from torch import nn

from i3d_gn.engine.activations import ActivationPercentiles, percentiles
from i3d_gn.engine.run_log import PERCENTILES
from i3d_gn.engine.typed_config import ConfigError


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d, "view"], ids=str
)
def test_percentiles_are_those_of_numpy_in_any_layout(layout):
    values = torch.randn(2, 6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    values = values[:, ::2] if layout == "view" else values.contiguous(memory_format=layout)
    expected = np.percentile(values.numpy(), PERCENTILES)
    np.testing.assert_allclose(percentiles(values), expected, rtol=1e-5)


def test_percentiles_of_a_large_tensor_sample_all_of_its_columns():
    columns = torch.arange(70.0).repeat(100_000)  # a stride of 7 would see ten of them
    np.testing.assert_allclose(percentiles(columns), [0, 13.8, 55.2, 69], atol=1)


def test_last_forward_pass_inside_the_block_counts():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    activations = ActivationPercentiles(model, ["1"])
    for wanted, values in ((True, [7.0]), (True, [-1.0, 0.0, 1.0]), (False, [5.0])):
        with activations.measured(wanted):
            model(torch.tensor(values))
    model(torch.tensor([6.0]))
    expected = np.percentile([0.0, 0.0, 1.0], PERCENTILES).tolist()
    assert activations.read() == {"1": pytest.approx(expected)}


def test_unknown_layer_is_an_error_that_names_similar_ones():
    with pytest.raises(ConfigError, match=r"no layer 'conv2d'; similar names are conv2"):
        ActivationPercentiles(nn.ModuleDict({"conv1": nn.ReLU(), "conv2": nn.ReLU()}), ["conv2d"])
