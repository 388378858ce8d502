"""Operators that tracers know of, at the price of a Python function where none is at work.

`torch.library` lets `torch.compile` and other tracers see an operator as a whole, but adds more to
a call than the kernels of a small layer take: a network of 53 such layers then waits for Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Operator:
    """A function of tensors and its gradient: an operator to tracers, called directly otherwise.

    Args:
        name: `namespace::name` in `torch.ops`.
        forward: annotated with types that operators have; modifies no argument, returns no view
            of one; the first argument is a tensor.
        fake: makes results of the right shapes without computing them.
        setup_context: as `torch.autograd.Function` has it.
        backward: likewise.
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
                # Not by Function's own `setup_context`, which binds a signature at every call.
                output = forward(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return backward(ctx, *gradients)

        self._direct = Direct

    def __call__(self, *arguments: Any) -> Any:
        """Compute the result of `forward`, differentiable."""
        if _is_traced(arguments[0]):
            return self._registered(*arguments)
        if not torch.is_grad_enabled():
            return self._forward(*arguments)
        return self._direct.apply(*arguments)


def no_gradient(message: str) -> dict[str, Callable[..., Any]]:
    """`setup_context` and `backward` of an operator whose gradient is a RuntimeError."""

    def keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def fail(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(message)

    return {"setup_context": keep_nothing, "backward": fail}


def _is_traced(x: Tensor) -> bool:
    """Whether somebody records operators on `x`, or it is no tensor with memory of its own."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )
