"""Custom operators that skip `torch.library` when nothing is tracing.

`torch.library` makes an operator opaque to `torch.compile` and other tracers, but its overhead per
call exceeds the kernel time of a small layer: a network of 53 such layers is then bound by Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Operator:
    """A differentiable function: a custom operator under tracing, called directly otherwise.

    Args:
        name: `namespace::name` in `torch.ops`.
        forward: annotated with types that `torch.library` supports. It must not modify its
            arguments nor return views of them. Its first argument is a tensor.
        fake: returns empty results of the right shapes, dtypes and strides.
        setup_context: as for `torch.autograd.Function`.
        backward: as for `torch.autograd.Function`.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
    ) -> None:
        self._forward = forward
        self._registered = torch.library.custom_op(name, forward, mutates_args=())
        self._registered.register_fake(fake)
        self._registered.register_autograd(backward, setup_context=setup_context)

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                # `Function.setup_context` would bind a signature at every call.
                output = forward(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return backward(ctx, *gradients)

        self._direct = Direct

    def __call__(self, *arguments: Any) -> Any:
        """Compute `forward`, differentiably."""
        if _is_traced(arguments[0]):
            return self._registered(*arguments)
        if not torch.is_grad_enabled():
            return self._forward(*arguments)
        return self._direct.apply(*arguments)


def no_gradient(message: str) -> dict[str, Callable[..., Any]]:
    """`setup_context` and `backward` of an operator whose backward raises a RuntimeError."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(message)

    return {"setup_context": setup_context, "backward": backward}


def _is_traced(x: Tensor) -> bool:
    """Whether operators on `x` are being traced, or `x` is not a plain tensor with data."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )
