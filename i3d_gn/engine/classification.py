"""What training classifiers of clips and of images have in common: loss, accuracy, validation."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3d_gn.data.batches import Batch
from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.checkpoint import CheckpointError
from i3d_gn.engine.distributed import Process, broadcast_from_main
from i3d_gn.engine.metrics import ClassificationMetrics
from i3d_gn.engine.task import Task


@dataclass(frozen=True)
class LossOptions:
    """What the training loss has besides cross-entropy; validation has none of it.

    Attributes:
        label_smoothing: Share of the target that is spread evenly over all classes (Szegedy et al.,
            arXiv:1512.00567, section 7).
        class_weights: (K,), on the device: weights of samples by their class.
        mix: Mixes the samples of a micro-batch: inputs (N, C, *) and labels (N,) to inputs and
            targets (N, K).
    """

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


class ClassificationTask(Task[Batch]):
    """Training with cross-entropy, measured by top-1 and top-5 accuracy.

    Args:
        process: This rank.
        micro_batch_size: Samples of a complete micro-batch, by which its loss is divided: a broken
            sample contributes nothing, and the others weigh the same as ever.
    """

    loss_options = LossOptions()
    to_device: ToDevice  # set when weights are loaded: mean and std belong to them

    def __init__(self, process: Process, *, micro_batch_size: int) -> None:
        self.process = process
        self.micro_batch_size = micro_batch_size
        self._metrics = ClassificationMetrics(process.device)

    @property
    def metrics(self) -> ClassificationMetrics:
        """Loss and accuracy over the training samples since the last log line."""
        return self._metrics

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a micro-batch."""
        losses, weights = _cross_entropy(
            network, batch, self.to_device, self.metrics, self.loss_options
        )
        return (losses * weights).sum() / self.micro_batch_size

    def summary(self, values: dict[str, float]) -> str:
        """Loss and top-1 accuracy."""
        return f"loss {values['loss']:.4f}  top-1 {values['top1']:.1f} %"

    def state(self) -> dict[str, Any]:
        """How the input must be normalized for these weights, see `saved_normalization`."""
        return {"input": {"mean": list(self.to_device.mean), "std": list(self.to_device.std)}}


def saved_normalization(saved: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std from the contents of a checkpoint.

    Raises:
        CheckpointError: They are missing, or not three numbers each.
    """
    values = saved.get("input")
    values = values if isinstance(values, dict) else {}
    return _three_numbers(values, "mean"), _three_numbers(values, "std")


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], to_device: ToDevice
) -> tuple[dict[str, float], list[str]]:
    """Loss and accuracy over samples ([GN] Fig. 7: one augmented clip per video).

    All ranks use the running statistics of rank 0, which are the ones that checkpoints save.

    Returns:
        `ClassificationMetrics.read_and_reset()` over all ranks, and one line for each sample of
        this rank that failed to decode.

    Raises:
        ValueError: No sample could be decoded.
    """
    model.eval()
    broadcast_from_main(model.buffers())
    metrics = ClassificationMetrics(to_device.device)
    broken: list[str] = []
    for batch in batches:
        _cross_entropy(model, batch, to_device, metrics)
        broken += batch.broken
    values = metrics.read_and_reset()
    if not values["samples"]:
        reason = broken[0] if broken else "see the other ranks"
        raise ValueError(f"no sample of the validation could be decoded: {reason}")
    return values, broken


def _cross_entropy(
    network: nn.Module,
    batch: Batch,
    to_device: ToDevice,
    metrics: ClassificationMetrics,
    options: LossOptions = LossOptions(),
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and weights (N,) of a batch, which is added to `metrics`."""
    inputs = to_device(batch.inputs)
    labels = batch.labels.to(to_device.device, non_blocking=True)
    weights = batch.weights.to(to_device.device, non_blocking=True)
    targets = labels
    if options.mix is not None:
        inputs, targets = options.mix(inputs, labels)
    with to_device.autocast():
        logits = network(inputs)
    losses = F.cross_entropy(
        logits.float(), targets, reduction="none", label_smoothing=options.label_smoothing
    )
    if options.class_weights is not None:
        per_class = options.class_weights
        losses = losses * (per_class[labels] if targets is labels else targets @ per_class)
    metrics.update(losses, logits, labels, weights, len(batch.broken))
    return losses, weights


def _three_numbers(values: dict[str, Any], key: str) -> tuple[float, ...]:
    numbers = values.get(key)
    if not (
        isinstance(numbers, list)
        and len(numbers) == 3
        and all(isinstance(number, float) for number in numbers)
    ):
        raise CheckpointError(f"the checkpoint is damaged: its {key} is {numbers!r}")
    return tuple(numbers)
