"""Swap the normalization layers of any network for those of this package."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from i3d_gn.norm.batch_renorm import BatchRenorm
from i3d_gn.norm.frozen_batch_norm import FrozenBatchNorm
from i3d_gn.norm.make_norm import DEFAULT_NUM_GROUPS, make_norm
from i3d_gn.norm.split_batch_norm import SplitBatchNorm

# Norms that share batch norm's parameters and running statistics.
BATCH_NORMS = ("bn", "sync_bn", "frozen_bn", "brn")

_DIMS = {
    nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3,
    nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3,
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
}  # fmt: skip
# Neither torchvision's Normalize nor torch's parametrizations, _WeightNorm and _SpectralNorm.
_NORM_NAME = re.compile(r"(?!_).*Norm(?!aliz)")
_KEPT_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
# Activation layers inside timm's BatchNormAct2d and its relatives, in their order.
_ACTIVATIONS = ("drop", "act")
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_pre_hooks",
    "_backward_hooks", "_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class ReplacedNorm:
    """One layer before and after.

    Attributes:
        name: Path in the network.
        before, after: Classes.
        num_channels: C.
        num_groups: G of a group norm, None for other norms.
    """

    name: str
    before: str
    after: str
    num_channels: int
    num_groups: int | None = None


@dataclass(frozen=True)
class NormReport:
    """What `replace_norm` did.

    Attributes:
        replaced: Layers in the order of the network.
        adjusted: Names of those with another number of groups or channels per group than requested,
            because that does not divide their channels.
        skipped: Layers that could not be replaced, with the reason.
        unchanged: Number of other normalization layers by class, such as layer norms and timm's
            EvoNorm2dS0.
        notes: What changes beyond the layers themselves.
    """

    replaced: tuple[ReplacedNorm, ...]
    adjusted: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    unchanged: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = Counter((layer.before, layer.after) for layer in self.replaced)
        lines = [f"{count} {old} -> {new}" for (old, new), count in kinds.items()]
        lines = lines or ["no layer replaced"]
        by_name = {layer.name: layer for layer in self.replaced}
        groups = Counter(
            (by_name[name].num_channels, by_name[name].num_groups) for name in self.adjusted
        )
        lines += [
            f"{count} of them with {num_groups} groups for their {num_channels} channels"
            for (num_channels, num_groups), count in sorted(groups.items())
        ]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"{count} {kind} unchanged" for kind, count in self.unchanged.items()]
        return "; ".join([*lines, *self.notes])


def replace_norm(
    model: nn.Module,
    norm: str,
    *,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    over: str = "thw",
    stats_batch_size: int | None = None,
    eps: float | None = None,
    copy_affine: bool = False,
) -> NormReport:
    """Replace all batch, sync, frozen and instance norms of a network, in place.

    Names, devices, dtypes, hooks, training mode and `requires_grad` are kept. Activations inside a
    layer, as in timm's BatchNormAct2d, still run after it. Between kinds of batch norm, parameters
    and running statistics are kept too. Layers without gamma and beta stay so where the new norm
    allows it. Build the optimizer afterwards: there are new parameters.

    Args:
        model: any network; torchvision, timm, pytorchvideo and MONAI build theirs of these layers.
        norm: a name for `make_norm`.
        num_groups: for `gn`, 32 by default. Where it does not divide the channels of a layer, the
            largest smaller divisor is used, and the report says so.
        channels_per_group: for `gn`, instead of `num_groups`; adjusted in the same way.
        over: for `gn`, `ln` and `in`: see `GroupNorm`.
        stats_batch_size: for `bn` and `brn`: see `make_norm`.
        eps: None to keep that of each layer.
        copy_affine: also keep gamma and beta where statistics change, as from batch norm to group
            norm; they are the same parameters. Otherwise they start at 1 and 0.

    Returns:
        What was replaced, what was not, and why.

    Raises:
        ValueError: `norm` or an option is invalid, or `model` is itself a normalization layer, a
            TorchScript module, has uninitialized (lazy) layers, or is wrapped for data parallelism.
            The network is then unchanged.

    Warns:
        UserWarning: Batch norms with trained running statistics were replaced by a norm that cannot
            use them: the network must be trained further.
    """
    layers = _layers_to_replace(model)
    options: dict[str, Any] = {"over": over, "stats_batch_size": stats_batch_size}
    asked: dict[str, Any] = {"num_groups": num_groups, "channels_per_group": channels_per_group}
    # Check the options, with a number of channels that suits them.
    make_norm(norm, num_groups or channels_per_group or DEFAULT_NUM_GROUPS, **options, **asked)
    dims_of_convolutions = {_dims(m) for m in model.modules() if _dims(m, convolutions=True)}

    new_layers: dict[int, nn.Module] = {}
    replaced, adjusted, skipped = [], [], {}
    notes: set[str] = set()
    trained = 0
    for name, layer in layers:
        if _is_same_norm(layer, norm, stats_batch_size):
            continue
        dims = _dims(layer)
        if dims is None and len(dims_of_convolutions) == 1:
            (dims,) = dims_of_convolutions
        if reason := _why_not(layer, norm, dims, over):
            skipped[name] = reason
            continue
        num_channels = _num_channels(layer)
        groups = _fitting_groups(norm, num_channels, **asked)
        if id(layer) not in new_layers:
            new_layers[id(layer)] = _make(
                layer, norm, num_channels, groups, options, dims or 3, eps, copy_affine
            )
            trained += norm not in BATCH_NORMS and _has_trained_statistics(layer)
            if not _has_affine(layer) and norm == "brn":
                notes.add("layers without gamma and beta have them now")
        new = new_layers[id(layer)]
        replaced.append(
            ReplacedNorm(
                name, type(layer).__name__, type(new).__name__, num_channels,
                getattr(new, "num_groups", None),
            )
        )  # fmt: skip
        wanted = channels_per_group or (num_groups or DEFAULT_NUM_GROUPS)
        if norm == "gn" and wanted != next(iter(groups.values())):
            adjusted.append(name)
    for name, layer in layers:
        if id(layer) in new_layers:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = new_layers[id(layer)]
    if trained:
        message = (
            f"{trained} batch norms had running statistics of training, which {norm!r} does not "
            "use: outputs differ, and the network must be trained further"
        )
        notes.add(message)
        warnings.warn(message, stacklevel=2)
    known = {id(new) for new in new_layers.values()}
    known |= {id(model.get_submodule(name)) for name in skipped}
    unchanged = Counter(
        type(m).__name__ for m in model.modules() if _normalizes(m) and id(m) not in known
    )
    return NormReport(
        tuple(replaced), tuple(adjusted), skipped, dict(unchanged), tuple(sorted(notes))
    )


def swap_layer(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the training mode, hooks and activation layers of `old`, which it replaces."""
    new.train(old.training)
    for name in _HOOKS:
        # The same dictionaries, so that handles of the hooks can still remove them.
        setattr(new, name, getattr(old, name))
    activations = {name: old._modules[name] for name in _ACTIVATIONS if name in old._modules}
    for name, module in activations.items():
        new.add_module(name, module)
    if activations and _activate not in new._forward_hooks.values():
        new.register_forward_hook(_activate, prepend=True)


def is_frozen_batch_norm(layer: nn.Module) -> bool:
    """Whether `layer` is a frozen batch norm: ours, torchvision's, timm's or detectron2's."""
    return isinstance(layer, FrozenBatchNorm) or (
        type(layer).__name__.startswith("FrozenBatchNorm")
        and {"weight", "bias", "running_mean", "running_var"} <= set(layer._buffers)
    )


def other_submodules(layer: nn.Module) -> list[str]:
    """Submodules of a norm of which it is unknown what they do."""
    return [name for name in layer._modules if name not in _ACTIVATIONS]


def _activate(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    for name in _ACTIVATIONS:
        if name in layer._modules:
            output = layer.get_submodule(name)(output)
    return output


def _layers_to_replace(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All paths to layers that normalize like batch or instance norm."""
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{kind} is a TorchScript module; replace its norms before scripting it")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"replace the norms before wrapping the network in {kind}")
    layers = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (_BatchNorm, _InstanceNorm)) or is_frozen_batch_norm(module)
    ]
    for name, layer in layers:
        if not name:
            raise ValueError(f"the model is itself a {kind}; make another one with make_norm")
        if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
            raise ValueError(f"{name} is not initialized yet; run the network once before")
    return layers


def _normalizes(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, for libraries' own by its name."""
    looks_like_one = (
        _NORM_NAME.match(type(module).__name__) is not None or "running_var" in module._buffers
    )
    return isinstance(module, _KEPT_NORMS) or (looks_like_one and not other_submodules(module))


def _is_same_norm(layer: nn.Module, norm: str, stats_batch_size: int | None) -> bool:
    """Whether there is nothing to replace."""
    if norm == "bn" and stats_batch_size is None:
        return isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    if norm == "bn":
        return isinstance(layer, SplitBatchNorm) and layer.stats_batch_size == stats_batch_size
    if norm == "brn":
        return isinstance(layer, BatchRenorm) and layer.stats_batch_size == stats_batch_size
    if norm == "sync_bn":
        return isinstance(layer, nn.SyncBatchNorm)
    return norm == "frozen_bn" and is_frozen_batch_norm(layer)


def _why_not(layer: nn.Module, norm: str, dims: int | None, over: str) -> str | None:
    if is_parametrized(layer):
        return "its parameters are parametrized"
    if others := other_submodules(layer):
        return f"it has submodules of unknown purpose ({', '.join(others)})"
    if norm == "frozen_bn" and not isinstance(layer._buffers.get("running_mean"), Tensor):
        return "it has no running statistics to freeze"
    if norm == "bn" and dims is None:
        return "its number of dimensions is unknown"
    if over == "causal" and dims in (1, 2):
        return f"it has {dims} spatial dimensions, and causal statistics need (T, H, W)"
    return None


def _make(
    layer: nn.Module,
    norm: str,
    num_channels: int,
    groups: Mapping[str, Any],
    options: Mapping[str, Any],
    dims: int,
    eps: float | None,
    copy_affine: bool,
) -> nn.Module:
    old_eps = layer.eps
    assert isinstance(old_eps, float)
    eps = old_eps if eps is None else eps
    if norm == "bn" and options["stats_batch_size"] is None:
        new = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](num_channels, eps=eps)
    else:
        new = make_norm(norm, num_channels, eps=eps, **options, **groups)
    from_batch_norm = isinstance(layer, _BatchNorm) or is_frozen_batch_norm(layer)
    if from_batch_norm and norm in ("bn", "sync_bn") and (momentum := _momentum(layer)) is not None:
        new.momentum = momentum  # type: ignore[assignment]
    like = _any_tensor(layer)
    if like is not None:
        new.to(like.device, like.dtype)
    between_batch_norms = from_batch_norm and norm in BATCH_NORMS
    if not _has_affine(layer) and norm not in ("frozen_bn", "brn", "none"):
        new.register_parameter("weight", None)
        new.register_parameter("bias", None)
        new.affine = False  # type: ignore[assignment]
    for name in ("weight", "bias"):
        _copy(layer, new, name, values=copy_affine or between_batch_norms)
    if between_batch_norms:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            _copy(layer, new, name, values=True)
    swap_layer(layer, new)
    return new


def _copy(old: nn.Module, new: nn.Module, name: str, *, values: bool) -> None:
    """Copy a parameter or buffer, or at least whether it is trained."""
    source, target = getattr(old, name, None), getattr(new, name, None)
    if not isinstance(source, Tensor) or not isinstance(target, Tensor):
        return
    if isinstance(source, nn.Parameter) and isinstance(target, nn.Parameter):
        if values:
            setattr(new, name, source)
        else:
            target.requires_grad_(source.requires_grad)
    elif values:
        with torch.no_grad():
            target.copy_(source)


def _dims(module: nn.Module, *, convolutions: bool = False) -> int | None:
    """Spatial dimensions of a layer, by its class."""
    for kind, dims in _DIMS.items():
        if isinstance(module, kind) and (not convolutions or "Conv" in kind.__name__):
            return dims
    return 2 if type(module).__name__.endswith("2d") and not convolutions else None


def _num_channels(layer: nn.Module) -> int:
    num_channels = getattr(layer, "num_features", None)
    if num_channels is None:
        running_mean = layer.running_mean
        assert isinstance(running_mean, Tensor)
        num_channels = running_mean.numel()
    assert isinstance(num_channels, int)
    return num_channels


def _fitting_groups(
    norm: str, num_channels: int, num_groups: int | None, channels_per_group: int | None
) -> dict[str, int]:
    """The option of group norm with the largest divisor of C up to what was asked for."""
    if norm != "gn":
        return {}
    option = "num_groups" if channels_per_group is None else "channels_per_group"
    most = channels_per_group or num_groups or DEFAULT_NUM_GROUPS
    divisors = (d for d in range(min(most, num_channels), 0, -1) if num_channels % d == 0)
    return {option: next(divisors)}


def _has_affine(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight", None), Tensor)


def _momentum(layer: nn.Module) -> float | None:
    """The momentum to keep; that of Batch Renorm has another default."""
    momentum = getattr(layer, "momentum", None)
    return momentum if isinstance(momentum, float) and not isinstance(layer, BatchRenorm) else None


def _any_tensor(layer: nn.Module) -> Tensor | None:
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return next((t for t in tensors if t.is_floating_point()), None)


def _has_trained_statistics(layer: nn.Module) -> bool:
    if not (isinstance(layer, _BatchNorm) or is_frozen_batch_norm(layer)):
        return False
    mean, var = layer.running_mean, layer.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.is_meta:
        return False
    return bool((mean != 0).any() or (var != 1).any())
