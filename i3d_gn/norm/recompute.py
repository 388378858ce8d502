"""Activations that backward recomputes instead of saving them.

`torch.utils.checkpoint` drops everything inside a region and runs the whole region again,
statistics included. Here autograd saves single tensors as a function that recomputes them from
other tensors, which are saved in any case.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Recomputation:
    """Recomputes a tensor, once for every `num_uses` calls.

    Args:
        compute: returns the tensor; runs without autograd.
        num_uses: how many operators need the tensor in one backward pass. The tensor is held from
            the first of these calls to the last.
    """

    def __init__(self, compute: Callable[[], Tensor], *, num_uses: int) -> None:
        self._compute = compute
        self._num_uses = num_uses
        self._uses_left = 0
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        """Return the tensor."""
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
def saved_as(tensor: Tensor, recompute: Callable[[], Tensor]) -> Iterator[None]:
    """Inside this context, operators save `recompute` for backward in place of `tensor`."""
    # Autograd keeps the hooks alive, so they must not reference the tensor.
    key = _memory_key(tensor)

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        return recompute if _memory_key(saved) == key else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


def _memory_key(tensor: Tensor) -> tuple[object, ...]:
    # What Tensor.is_set_to compares; that method does not support the meta device.
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()
