"""An exponential moving average of weights, which is tested instead of the weights in training."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from i3d_gn.engine.checkpoint import load_model_state


class WeightAverage:
    """average = decay * average + (1 - decay) * weights after every step, from the first one on.

    As the teacher of Tarvainen & Valpola, arXiv:1703.01780. Buffers, such as the running statistics
    of batch norm, are averaged too. A checkpoint has the average as its `model`, so that whatever
    reads one tests the average, and the weights in training beside it.

    Args:
        model: In training; it is copied.
        decay: Between 0 and 1; averages over about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._averaged = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )

    @property
    def model(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Add the weights after a step."""
        self._averaged.update_parameters(model)

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint holds besides the average: the weights in training."""
        return {"model": model.state_dict(), "num_updates": int(self._averaged.n_averaged)}

    def load(self, saved: dict[str, Any], path: Any) -> None:
        """Continue from the checkpoint `saved`."""
        load_model_state(self.model, saved["model"], path=path)
        self._averaged.n_averaged.fill_(saved["average"]["num_updates"])
