"""The best validation so far, by a named metric, and when to stop for lack of a better one."""

from __future__ import annotations

from typing import Any

import torch

from i3d_gn.engine.distributed import Process, all_reduce_max

# Metrics of which less is better; of all others more is.
_LESS_IS_BETTER = ("loss", "error")


class BestValidation:
    """Keeps track of a metric over the validations of a run.

    Args:
        metric: Its name in TensorBoard, for instance `val/top1`; None keeps track of nothing.
        patience: Stop after so many validations in a row that are not better (early stopping;
            Prechelt, Early Stopping - But When?, 1998); None: never.
        process: This rank; rank 0 decides.
    """

    def __init__(self, metric: str | None, patience: int | None, process: Process) -> None:
        self.metric = metric
        self.patience = patience
        self.process = process
        self.value: float | None = None
        self.step = 0
        self.num_worse = 0

    @property
    def stops(self) -> bool:
        """Whether the run should end."""
        return self.patience is not None and self.num_worse >= self.patience

    def update(self, values: dict[str, float], step: int) -> bool:
        """Add the validation after `step` with these values; whether it is the best so far."""
        if self.metric is None:
            return False
        better = torch.zeros((), device=self.process.device)
        if self.process.is_main:
            value = values[self.metric]
            sign = -1 if self.metric.rpartition("/")[2] in _LESS_IS_BETTER else 1
            if self.value is None or sign * value > sign * self.value:
                self.value, self.step = value, step
                better += 1
        is_best = bool(all_reduce_max(better))
        self.num_worse = 0 if is_best else self.num_worse + 1
        return is_best

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "step": self.step, "num_worse": self.num_worse}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.value, self.step = state["value"], state["step"]
        self.num_worse = state["num_worse"]
