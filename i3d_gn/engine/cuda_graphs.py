"""A network in training as two CUDA graphs, forward and backward.

Launching the kernels of a 3-D ResNet one by one takes a current GPU longer than running them on a
few clips. A graph launches all of them at once; the results are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from i3d_gn.engine.typed_config import ConfigError

logger = logging.getLogger(__name__)


def can_capture(model: nn.Module) -> bool:
    """Whether forward and backward of `model` run on one GPU without its ranks communicating."""
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    return on_gpu and not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


def launch_as_graphs(model: nn.Module) -> None:
    """Make forward and backward of `model` in training two CUDA graphs, captured at its first call.

    Before wrapping it in DDP. Calls with more than one tensor or with inputs of another kind,
    validation and `torch.no_grad` run as before. Backward returns gradients in memory that the next
    backward overwrites.

    Raises (at the first call):
        ConfigError: The network cannot be captured.
    """
    model.forward = _Graphed(model)


class _Graphed:
    """The forward of a network: as graphs for inputs like the first one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forward: Callable[..., Tensor] = model.forward
        self._graphs: Callable[[Tensor], Tensor] | None = None
        self._captured_for: tuple[object, ...] = ()

    def __call__(self, *inputs: Tensor, **options: object) -> Tensor:
        if not self._model.training or not torch.is_grad_enabled() or options or len(inputs) != 1:
            return self._forward(*inputs, **options)
        x = inputs[0]
        if self._graphs is None:
            self._graphs = self._capture(x)
            self._captured_for = _kind(x)
        return self._graphs(x) if _kind(x) == self._captured_for else self._forward(x)

    def _capture(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        model = self._model
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        # torch replaces `forward` with one that runs the graphs.
        model.forward = self._forward
        try:
            with (
                torch.random.fork_rng(devices=[x.device]),
                # Casts of weights must be part of the graphs, not cached before they run.
                torch.autocast(
                    "cuda",
                    dtype=torch.get_autocast_dtype("cuda"),
                    enabled=torch.is_autocast_enabled("cuda"),
                    cache_enabled=False,
                ),
            ):
                torch.cuda.make_graphed_callables(
                    model, (x.detach().clone(),), allow_unused_input=True
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"the network could not be captured as a CUDA graph ({error}); set "
                "train.cuda_graphs=false"
            ) from error
        graphs, model.forward = model.forward, self
        with torch.no_grad():  # the warm-up has updated running statistics
            for buffer, before in buffers:
                buffer.copy_(before)
        logger.info("training runs as CUDA graphs, for inputs of shape %s", tuple(x.shape))
        return graphs


def _kind(x: Tensor) -> tuple[object, ...]:
    precision = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return x.shape, x.stride(), x.dtype, x.requires_grad, precision
