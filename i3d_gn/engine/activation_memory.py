"""Memory of a training step's activations, counted on the meta device: no GPU is needed."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors allocated in this context that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf.untyped_storage())
        return result

    def exclude(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor that existed before."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def step_bytes(
    model: nn.Module, clips_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that forward saves for backward, and the peak of forward and backward.

    Parameters, clips and buffers are not counted; gradients of parameters are part of the peak, and
    workspaces of convolutions are unknown. Convolutions and linear layers run in `dtype`, as under
    autocast; the rest of the network keeps its dtype.

    Args:
        model: On the meta device, in training mode. Its convolutions are converted to `dtype`.
        clips_shape: (N, C, T, H, W).
        dtype: Of the clips.
    """
    with torch.device("meta"):
        clips = torch.empty(clips_shape, dtype=dtype)
    channels_last = any(
        weight.dim() == 5 and not weight.is_contiguous() for weight in model.parameters()
    )
    if channels_last:
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            module.to(dtype)
            hooks.append(module.register_forward_pre_hook(_to_dtype_of_weight))
    try:
        with LiveBytes() as live:
            for tensor in (clips, *model.parameters(), *model.buffers()):
                live.exclude(tensor)
            loss = model(clips).sum()
            saved = live.now
            loss.backward()
            return saved, live.peak
    finally:
        model.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()


def _to_dtype_of_weight(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return (inputs[0].to(weight.dtype),)
