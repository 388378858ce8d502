"""Percentiles of the outputs of chosen layers during training, as in [GN] Fig. 6."""

import contextlib
import difflib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from i3d_gn.engine.run_log import PERCENTILES
from i3d_gn.engine.typed_config import ConfigError

# Values per layer that percentiles are computed of.
_MAX_VALUES = 1 << 20


class ActivationPercentiles:
    """Measures the outputs of layers while `measured` says so; the last forward pass counts.

    Args:
        model: The network, not compiled.
        layers: Names of modules whose output is one tensor, for instance "res5.2.conv3": before
            normalization and ReLU, as in [GN].

    Raises:
        ConfigError: The network has no such layer.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        modules = dict(model.named_modules())
        self._measuring = False
        self._values: dict[str, Tensor] = {}
        for name in layers:
            if not name or name not in modules:
                near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
                raise ConfigError(
                    f"log_activations: the network has no layer {name!r}; similar names are "
                    f"{', '.join(near) or 'none'}"
                )
            modules[name].register_forward_hook(self._hook(name))

    @contextlib.contextmanager
    def measured(self, wanted: bool) -> Iterator[None]:
        """Measure the forward passes inside the block, if `wanted`."""
        self._measuring = wanted
        try:
            yield
        finally:
            self._measuring = False

    def read(self) -> dict[str, list[float]]:
        """Layer -> the `PERCENTILES` of its last output. Waits for the device."""
        return {name: values.tolist() for name, values in self._values.items()}

    def _hook(self, name: str):
        def measure(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if self._measuring:
                self._values[name] = percentiles(output.detach())

        return measure


def percentiles(values: Tensor) -> Tensor:
    """The `PERCENTILES` of a tensor; of a million of its values, evenly spaced, if it is larger."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.dim())
    if last is not None and values.is_contiguous(memory_format=last):
        flat = values.as_strided((values.numel(),), (1,))  # `flatten` would copy all of it
    else:
        flat = values.flatten()
    stride = math.ceil(flat.numel() / _MAX_VALUES)
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1 and stride > 1:  # or it may visit a few columns only
        stride += 1
    ranks = torch.tensor([p / 100 for p in PERCENTILES]).to(values.device, non_blocking=True)
    return flat[::stride].float().quantile(ranks)
