"""Train a detector as [GN] section 4.2 does on COCO; the loop is `i3d_gn.engine.loop`.

Any number of GPUs runs the same experiment: a forward pass has `train.images_per_gpu` images, and
gradients accumulate to `train.global_batch_size`. Writes `config.yaml`, `log.jsonl`,
`tensorboard/`, `checkpoints/`, and after the last validation `results.json` and `detections.json`
under `output_dir`.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from i3d_gn.data.samplers import ShuffledMicroBatches
from i3d_gn.data.to_device import autocast
from i3d_gn.detection import build
from i3d_gn.detection.coco import DetectionBatch, TrainingCoco
from i3d_gn.detection.config import DetectionConfig
from i3d_gn.detection.evaluate import evaluate_model, images_of, summary, write_results
from i3d_gn.engine.classification import saved_normalization
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.metrics import DeviceSums
from i3d_gn.engine.run_log import RunLog
from i3d_gn.engine.task import Task
from i3d_gn.engine.training import train_task
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.files import file_sha256
from i3d_gn.models.mask_rcnn import load_detector_weights

logger = logging.getLogger(__name__)

# torchvision's names of the losses, which are summed.
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


def train_coco(config: DetectionConfig, process: Process) -> None:
    """Train to `config.train.steps`, from the newest checkpoint if there is one.

    Raises:
        ConfigError: The data, the number of ranks, or an earlier run do not match the config.
        NonFiniteLossError: Training diverged; checkpoints saved before that are good.
        ValueError: An image or the weights cannot be read.
    """
    train_task(DetectionTraining(config, process), config.train, config)


class LossMetrics(DeviceSums):
    """Sums of the losses, and of images."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(len(LOSSES) + 1, device)

    def update(self, losses: Mapping[str, Tensor], num_images: int) -> None:
        """Add the mean losses of a micro-batch."""
        values = torch.stack([losses[name].detach().double() for name in LOSSES])
        self.sums[:-1] += values * num_images
        self.sums[-1] += num_images

    def read_and_reset(self) -> dict[str, float]:
        """Means over all ranks, their sum as `loss`, and the counts `samples` and `broken`."""
        *sums, samples = self.read()
        means = {name: total / max(samples, 1.0) for name, total in zip(LOSSES, sums, strict=True)}
        return {"loss": sum(means.values()), **means, "samples": int(samples), "broken": 0}


class DetectionTraining(Task[DetectionBatch]):
    """Flipped images with objects, validated by average precision on all validation images."""

    unit = "images"
    fixed_shapes = False

    def __init__(self, config: DetectionConfig, process: Process) -> None:
        self.config, self.process = config, process
        self.micro_batch_size = config.train.images_per_gpu
        data = config.data
        self.train_images = build.load_images(data.train_images, data.train_annotations, config)
        self.val_images = build.load_images(data.val_images, data.val_annotations, config)
        sides = [(i.category_ids, i.class_names) for i in (self.train_images, self.val_images)]
        if sides[0] != sides[1]:
            raise ConfigError(
                f"{data.train_annotations} and {data.val_annotations} have different categories; "
                "both must list the same ids and names"
            )
        self.examples = TrainingCoco(self.train_images, seed=config.seed)
        if not len(self.examples):
            raise ConfigError(f"{data.train_annotations}: no image has an object to train on")
        self._data = {
            "training images": self.train_images.describe(),
            "validation images": self.val_images.describe(),
            "training annotations": file_sha256(data.train_annotations)[:16],
            "validation annotations": file_sha256(data.val_annotations)[:16],
        }
        self._metrics = LossMetrics(process.device)

    @property
    def metrics(self) -> LossMetrics:
        """The losses since the last log line."""
        return self._metrics

    def build_model(self) -> nn.Module:
        """The network of the config."""
        self.model = build.build_model(self.config, self.process.device)
        return self.model

    def data(self) -> dict[str, str]:
        """Categories and counts of both sets, and hashes of their annotations."""
        return self._data

    def load_weights(self, model: nn.Module) -> None:
        """Load `model.weights`, if any."""
        weights = self.config.model.weights
        if weights is not None:
            assert isinstance(model, MaskRCNN)
            load_detector_weights(model, weights, self.train_images.category_ids)

    def load_state(self, saved: dict[str, Any]) -> None:
        """Mean and std of the input belong to the weights."""
        mean, std = saved_normalization(saved)
        transform: Any = self.model.transform
        transform.image_mean, transform.image_std = list(mean), list(std)

    def state(self) -> dict[str, Any]:
        """Mean and std of the input, and what the labels mean."""
        transform: Any = self.model.transform
        return {
            "input": {"mean": list(transform.image_mean), "std": list(transform.image_std)},
            "class_names": self.train_images.class_names,
        }

    def training_batches(self, first_step: int) -> Iterable[DetectionBatch]:
        """Flipped images of the shuffled training set."""
        order = ShuffledMicroBatches(
            len(self.examples),
            seed=self.config.seed,
            global_batch_size=self.config.train.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=self.process.rank,
            world_size=self.process.world_size,
            first_step=first_step,
            last_step=self.config.train.steps,
        )
        return build.image_loader(self.examples, order, self.config, self.process)

    def loss(self, network: nn.Module, batch: DetectionBatch) -> Tensor:
        """Sum of the losses of regions, boxes and masks of a micro-batch."""
        device = self.process.device
        targets = [
            {key: value.to(device, non_blocking=True) for key, value in target.items()}
            for target in batch.targets
        ]
        with autocast(device, self.config.train.precision):
            losses = network(images_of(batch, device), targets)
        self.metrics.update(losses, len(batch.images))
        return torch.stack([losses[name].float() for name in LOSSES]).sum()

    def summary(self, values: dict[str, float]) -> str:
        """The loss and its parts."""
        parts = "  ".join(f"{n.removeprefix('loss_')} {values[n]:.3f}" for n in LOSSES)
        return f"loss {values['loss']:.4f} ({parts})"

    def validate(self, model: nn.Module, step: int, log: RunLog) -> None:
        """Average precision; the last one is the result of the run."""
        recipe = self.config.train
        values, records = evaluate_model(model, self.val_images, self.config, self.process)
        log.write("val", step, values)
        logger.info("step %d  %s", step, summary(values))
        may_be_last = step == recipe.steps or recipe.patience is not None
        if may_be_last and self.process.is_main:
            write_results(
                Path(self.config.output_dir), values, records, self.val_images, f"step {step}"
            )
