"""Fold batch norms with fixed statistics into the convolutions before them, for inference."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from i3d_gn.norm.replace_norm import is_frozen_batch_norm, other_submodules, swap_layer


@dataclass(frozen=True)
class FoldReport:
    """What `fold_norm` did.

    Attributes:
        folded: Names of the batch norms that are identities now, with the convolution that does
            their work.
        skipped: Names of the other batch norms, with the reason.
    """

    folded: Mapping[str, str]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} batch norms folded into convolutions"]
        return "; ".join(
            [*lines, *(f"skipped {name}: {reason}" for name, reason in self.skipped.items())]
        )


@torch.no_grad()
def fold_norm(model: nn.Module, *inputs: Any) -> FoldReport:
    """Fold batch norms with fixed statistics into the convolutions before them, in place.

    A batch norm in evaluation mode, or a frozen one, is an affine map per channel, which the
    weight and bias of a convolution can do as well: the network computes the same, up to rounding,
    in less time. It must not be trained afterwards. The network runs once, to see which convolution
    feeds which norm; a pair is folded only if nothing else reads the convolution's result.

    Args:
        model: any network in evaluation mode.
        inputs: for one call of `model`, such as a small batch of zeros on its device.

    Returns:
        What was folded, what was not, and why.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or is_frozen_batch_norm(module)
    }
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    with _watched(convolutions, norms) as run:
        result = model(*inputs)
    returned = {_memory(t) for t in tree_leaves(result) if isinstance(t, Tensor)}

    folded, skipped = {}, {}
    shared = _shared_parameters(model)
    for name, norm in norms.items():
        conv_name = run.source.get(name)
        conv = convolutions.get(conv_name) if conv_name is not None else None
        reason = _why_not(norm, run.calls.get(name, 0))
        if reason is None and (conv is None or conv_name is None):
            reason = "its input is not the result of a convolution"
        if reason is None and conv is not None and conv_name is not None:
            reason = _why_not_into(conv, run.calls[conv_name], shared)
            if reason is None and conv_name in run.unusual:
                reason = f"{conv_name} does more than a convolution"
            used_elsewhere = run.readers[conv_name] != {name} or run.memory[conv_name] in returned
            if reason is None and used_elsewhere:
                reason = f"the result of {conv_name} is used elsewhere too"
        if reason is not None:
            skipped[name] = reason
            continue
        assert conv is not None and conv_name is not None
        _fold(conv, norm)
        folded[name] = conv_name
    for name in folded:
        identity = nn.Identity()
        swap_layer(norms[name], identity)
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if module is norms[name]:
                parent, _, child = path.rpartition(".")
                model.get_submodule(parent)._modules[child] = identity
    return FoldReport(folded, skipped)


class _Run(TorchDispatchMode):
    """Which layers and operators read the results of convolutions in one run.

    Attributes:
        source: The convolution that a norm's input comes from, by name.
        readers: The norms that read a convolution's result; None stands for any other operator.
        calls: Of each convolution and norm.
        memory: Of a convolution's result.
        unusual: Convolutions whose result differs from that of their weight, bias and options.
    """

    def __init__(self) -> None:
        super().__init__()
        self.source: dict[str, str] = {}
        self.readers: dict[str, set[str | None]] = {}
        self.calls: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.unusual: set[str] = set()
        self._norm: str | None = None  # that is running
        self._convolution_of: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no memory is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (name := self._convolution_of.get(_memory(tensor))):
                self.readers[name].add(self._norm)
        return func(*args, **(kwargs or {}))

    def after_convolution(self, name: str, conv: Any, inputs: tuple[Any, ...], y: Any) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.readers.setdefault(name, set())
        if isinstance(conv, _ConvTransposeNd):
            usual = type(conv).forward in (
                nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward,
            )  # fmt: skip
        else:
            expected = conv._conv_forward(inputs[0], conv.weight, conv.bias)
            usual = expected.shape == y.shape and torch.allclose(expected, y, 1e-3, 1e-4)
        if not usual:
            self.unusual.add(name)
        self.memory[name] = _memory(y)
        self._convolution_of[_memory(y)] = name
        self._alive.append(y)

    def before_norm(self, name: str, _norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self._norm = name
        if (source := self._convolution_of.get(_memory(inputs[0]))) is not None:
            self.source[name] = source

    def after_norm(self, *_: Any) -> None:
        self._norm = None


@contextmanager
def _watched(convolutions: Mapping[str, _ConvNd], norms: Mapping[str, nn.Module]) -> Iterator[_Run]:
    run = _Run()
    handles = []
    for name, conv in convolutions.items():
        handles.append(conv.register_forward_hook(partial(run.after_convolution, name)))
    for name, norm in norms.items():
        handles.append(norm.register_forward_pre_hook(partial(run.before_norm, name)))
        handles.append(norm.register_forward_hook(run.after_norm))
    try:
        with run:
            yield run
    finally:
        for handle in handles:
            handle.remove()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _why_not(norm: nn.Module, calls: int) -> str | None:
    if isinstance(norm, _BatchNorm):
        if norm.running_mean is None:
            return "it has no running statistics"
        if norm.training:
            return "it is in training mode; call model.eval() first"
    if other_submodules(norm):
        return "it has submodules of unknown purpose"
    return None if calls == 1 else f"it was called {calls} times"


def _why_not_into(conv: _ConvNd, calls: int, shared: set[int]) -> str | None:
    if calls != 1:
        return f"its convolution was called {calls} times"
    if is_parametrized(conv) or id(conv.weight) in shared or id(conv.bias) in shared:
        return "the weight of its convolution is parametrized or shared"
    if conv.weight.dtype not in (torch.float32, torch.float64):
        return f"{conv.weight.dtype} would round the weights; fold first, then convert"
    if isinstance(conv, _ConvTransposeNd) and conv.groups > 1:
        return "its convolution is transposed and has groups"
    return None


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _fold(conv: _ConvNd, norm: nn.Module) -> None:
    """Make `conv` compute the norm too; in float64, rounded once."""
    mean, var, eps = norm.running_mean, norm.running_var, norm.eps
    assert isinstance(mean, Tensor) and isinstance(var, Tensor) and isinstance(eps, float)
    scale = (var.double() + eps).rsqrt()
    shift = torch.zeros_like(scale)
    if isinstance(norm.weight, Tensor):
        scale = scale * norm.weight.double()
    if isinstance(norm.bias, Tensor):
        shift = norm.bias.double()
    bias = shift - mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.double() * scale
    axis = 1 if isinstance(conv, _ConvTransposeNd) else 0
    by_channel = [1] * conv.weight.dim()
    by_channel[axis] = -1
    conv.weight.copy_(conv.weight.double() * scale.view(by_channel))
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
