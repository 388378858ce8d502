"""One optimizer step over accumulated micro-batches, on one rank or several."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from i3d_gn.data.batches import AnyBatch, Stream
from i3d_gn.engine.command import NonFiniteLossError
from i3d_gn.engine.distributed import Process, all_reduce_max


class Trainer:
    """Takes optimizer steps; nothing in a step waits for the device.

    Args:
        network: The network, wrapped in DDP if there are several ranks.
        optimizer: Its learning rate is set by the caller.
        loss: The mean loss of a micro-batch, from network and batch.
        micro_batches: Micro-batches per step on this rank.
        process: This rank.
        seed: Of dropout, together with step and micro-batch.
        clip_grad_norm: Maximum norm of the gradient, or None.
        loss_scaling: Scale the loss, as fp16 needs.
        gradients_are_overwritten: A backward overwrites the gradients of the one before, as those
            of `launch_as_graphs` do.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        micro_batches: int,
        process: Process,
        seed: int,
        clip_grad_norm: float | None = None,
        loss_scaling: bool = False,
        gradients_are_overwritten: bool = False,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.loss = loss
        self.micro_batches = micro_batches
        self.process = process
        self.seed = seed
        self.clip_grad_norm = clip_grad_norm
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=loss_scaling)
        self.gradients_are_overwritten = gradients_are_overwritten
        self.measure_gradient = False  # put the norm before clipping into `gradient_norm`
        self.gradient_norm: Tensor | None = None
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=process.device)

    def step(self, step: int, batches: Iterator[AnyBatch]) -> list[str]:
        """Take step number `step` with the next micro-batches.

        The gradient is that of the mean loss over the global batch; a broken sample contributes
        nothing to it.

        Returns:
            One line for each sample of this rank that failed to decode.
        """
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        broken: list[str] = []
        for i, batch in enumerate(itertools.islice(batches, self.micro_batches)):
            self._seed_dropout(step, i)
            with self._gradient_sync(last=i == self.micro_batches - 1):
                loss = self.loss(self.network, batch)
                self.scaler.scale(loss / self.micro_batches).backward()
            if self.gradients_are_overwritten and i == 0 and self.micro_batches > 1:
                for parameter in self.network.parameters():
                    parameter.grad = None if parameter.grad is None else parameter.grad.clone()
            bad = (self._first_bad_step < 0) & ~torch.isfinite(loss.detach())
            self._first_bad_step = torch.where(bad, step, self._first_bad_step)
            broken += batch.broken
        if self.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            self.gradient_norm = nn.utils.clip_grad_norm_(
                self.network.parameters(), self.clip_grad_norm
            )
        elif self.measure_gradient:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            self.gradient_norm = nn.utils.get_total_norm(gradients) / self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return broken

    def check_finite(self, *, everything: bool = False) -> None:
        """Stop a run that diverged. Waits for the device: call it when logging and saving only.

        Args:
            everything: Also check what a checkpoint saves: parameters, buffers, optimizer state.

        Raises:
            NonFiniteLossError: Something is not finite, on this rank or another.
        """
        bad_step = int(all_reduce_max(self._first_bad_step.clone()))
        if bad_step >= 0:
            raise NonFiniteLossError(f"the loss is not finite at step {bad_step + 1}")
        if everything:
            named = [(name, t) for name, t in self._saved_tensors() if t.is_floating_point()]
            bad = ~torch.stack([tensor.detach().isfinite().all() for _, tensor in named])
            mine = [name for (name, _), is_bad in zip(named, bad.tolist(), strict=True) if is_bad]
            if int(all_reduce_max(bad.sum())):
                what = mine[0] if mine else "a tensor of another rank"
                raise NonFiniteLossError(f"{what} is not finite though the loss still is")

    def _saved_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.network.named_parameters():
            yield f"parameter {name}", parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"{key} of {name}", value.to(parameter.device)
        for name, buffer in self.network.named_buffers():
            yield f"buffer {name}", buffer

    def state(self) -> dict[str, Any]:
        """State of the loss scaling, for a checkpoint."""
        return {"scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.scaler.load_state_dict(state["scaler"])

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are all-reduced once per step, after the last micro-batch."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _seed_dropout(self, step: int, i: int) -> None:
        """Seed by the micro-batch, not the rank: one GPU drops the same units as eight would."""
        micro_batch = i * self.process.world_size + self.process.rank
        sequence = np.random.SeedSequence((self.seed, Stream.DROPOUT, step, micro_batch))
        torch.manual_seed(int(sequence.generate_state(1)[0]))
