"""What the training loop needs to know about what is trained."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from i3d_gn.data.batches import AnyBatch
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.run_log import RunLog
from i3d_gn.video_io.strips import Strip

BatchT = TypeVar("BatchT", bound=AnyBatch)


class Metrics(Protocol):
    """Sums over samples, kept on the device."""

    def read_and_reset(self) -> dict[str, float]:
        """Means over all ranks, with the counts `samples` and `broken`."""
        ...

    def state(self) -> list[float]:
        """The sums over all ranks since they were last read."""
        ...

    def load_state(self, state: list[float]) -> None:
        """Continue from `state`."""
        ...


class Task(abc.ABC, Generic[BatchT]):
    """What is trained, on which data, and how it is validated."""

    unit: str  # of throughput, for instance "clips"
    process: Process
    micro_batch_size: int  # samples per forward pass of a rank
    fixed_shapes: bool = True  # batches all have the same shape
    max_broken: int = 0  # samples that may fail to decode before training stops
    max_broken_share: float = 1.0  # of all samples so far

    @property
    @abc.abstractmethod
    def metrics(self) -> Metrics:
        """Sums over the training samples since the last log line."""

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """Build the network, randomly initialized, on its device."""

    def lr_multiplier(self, parameter: str) -> float:
        """Factor of the learning rate of a parameter, by its name."""
        return 1.0

    @abc.abstractmethod
    def data(self) -> dict[str, str]:
        """What identifies each data set; a run resumes only with the same."""

    @abc.abstractmethod
    def load_weights(self, model: nn.Module) -> None:
        """Load the weights that a new run starts from, if any."""

    @abc.abstractmethod
    def load_state(self, saved: dict[str, Any]) -> None:
        """Continue from what `state` returned, the network itself excepted."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides network, optimizer and config."""

    @abc.abstractmethod
    def training_batches(self, first_step: int) -> Iterable[BatchT]:
        """This rank's micro-batches from `first_step` to the end of the run."""

    def strips(self, batch: BatchT) -> list[Strip]:
        """The samples of a training batch as pictures, to show what the network sees."""
        return []

    @abc.abstractmethod
    def loss(self, network: nn.Module, batch: BatchT) -> Tensor:
        """Mean loss of a micro-batch, which is added to `metrics`."""

    @abc.abstractmethod
    def summary(self, values: dict[str, float]) -> str:
        """The training metrics `values` for the console."""

    @abc.abstractmethod
    def validate(self, model: nn.Module, step: int, log: RunLog) -> None:
        """Validate the network after `step` steps, and log the result."""
