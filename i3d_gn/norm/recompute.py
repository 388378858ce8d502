"""Activations that backward computes again in place of keeping them.

`torch.utils.checkpoint` drops everything inside a region and runs the region again, statistics
included. Here single tensors are replaced, where autograd would keep them, by a function that
computes them from others which are kept in any case.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Recomputation:
    """Computes a tensor again, for each `num_uses` calls once.

    Args:
        compute: takes nothing, gives the tensor; runs without autograd.
        num_uses: how many operators need the tensor in one backward; it is held between the first
            and the last of them.
    """

    def __init__(self, compute: Callable[[], Tensor], *, num_uses: int = 1) -> None:
        self._compute = compute
        self._num_uses = num_uses
        self._uses_left = 0
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        """The tensor."""
        if self._value is None:
            with torch.no_grad():
                self._value = self._compute()
            self._uses_left = self._num_uses
        value = self._value
        self._uses_left -= 1
        if self._uses_left == 0:
            self._value = None
        return value


@contextmanager
def kept_as(tensor: Tensor, recomputation: Callable[[], Tensor]) -> Iterator[None]:
    """Operators called inside keep `recomputation` for backward where they would keep `tensor`."""
    # Autograd keeps the hooks, so they must not hold the tensor.
    memory = _memory(tensor)

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        return recomputation if _memory(saved) == memory else saved

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _memory(tensor: Tensor) -> tuple[object, ...]:
    # What Tensor.is_set_to compares; that does not know the meta device.
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()
