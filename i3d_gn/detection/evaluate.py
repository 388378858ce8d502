"""Test a detector on COCO: average precision of boxes and masks."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from i3d_gn.data.samplers import EachItemOnce
from i3d_gn.data.to_device import autocast
from i3d_gn.detection import build
from i3d_gn.detection.coco import (
    CocoImages,
    DetectionBatch,
    TestCoco,
    average_precision,
    coco_records,
)
from i3d_gn.detection.config import METRICS, DetectionConfig
from i3d_gn.engine.checkpoint import given_or_latest
from i3d_gn.engine.cores import limit_compute_threads, num_workers
from i3d_gn.engine.distributed import Process, broadcast_from_main, gather_on_main
from i3d_gn.files import print_line, write_json
from i3d_gn.models.mask_rcnn import load_detector_weights

logger = logging.getLogger(__name__)

Records = list[dict[str, Any]]


def evaluate_coco(config: DetectionConfig, process: Process, checkpoint: Path | None) -> None:
    """Test a checkpoint on the validation images, and write the results to `output_dir`.

    Args:
        config: Of the network, the data and the output.
        process: This rank.
        checkpoint: Of a run, or weights of another codebase's detector; None: the run's newest.

    Raises:
        CheckpointError: There is no checkpoint.
        ValueError: The weights do not fit the network, or data cannot be read.
    """
    limit_compute_threads(process, num_workers(config, process))
    output_dir = Path(config.output_dir)
    path = given_or_latest(checkpoint, output_dir)
    images = build.load_images(config.data.val_images, config.data.val_annotations, config)
    model = build.build_model(config, process.device)
    load_detector_weights(model, path, images.category_ids, whole=True)
    values, records = evaluate_model(model, images, config, process)
    if process.is_main:
        write_results(output_dir, values, records, images, str(path))
        print_line(f"{len(images)} images: {summary(values)}")


@torch.no_grad()
def evaluate_model(
    model: nn.Module, images: CocoImages, config: DetectionConfig, process: Process
) -> tuple[dict[str, float], Records]:
    """Detect objects in every image once, split across ranks.

    Returns:
        The average precision on all ranks, and on rank 0 the detections in the order of images.
    """
    model.eval()
    broadcast_from_main(model.buffers())
    order = EachItemOnce(
        len(images),
        batch_size=config.train.images_per_gpu,
        rank=process.rank,
        world_size=process.world_size,
    )
    mine: Records = []
    for batch in build.image_loader(TestCoco(images), order, config, process):
        with autocast(process.device, config.train.precision):
            outputs = model(images_of(batch, process.device))
        for image_id, detections in zip(batch.image_ids, outputs, strict=True):
            mine += coco_records(image_id, detections, images.category_ids)
    gathered = gather_on_main(mine, process)
    records = sorted((r for part in gathered for r in part), key=lambda r: r["image_id"])
    values = average_precision(images, records) if process.is_main else {}
    numbers = torch.tensor([values.get(name, 0.0) for name in METRICS], dtype=torch.float64)
    numbers = numbers.to(process.device)
    broadcast_from_main([numbers])
    return dict(zip(METRICS, numbers.tolist(), strict=True)), records


def images_of(batch: DetectionBatch, device: torch.device) -> list[Tensor]:
    """The images on the device, RGB in [0, 1]; the network normalizes and resizes them."""
    return [image.to(device, non_blocking=True).float() / 255 for image in batch.images]


def summary(values: dict[str, float]) -> str:
    """AP of boxes and masks for the console."""
    return "  ".join(
        f"{kind} AP {values[f'{kind}_ap']:.1f}  AP50 {values[f'{kind}_ap50']:.1f}"
        for kind in ("box", "mask")
    )


def write_results(
    output_dir: Path,
    values: dict[str, float],
    records: Records,
    images: CocoImages,
    checkpoint: str,
) -> None:
    """Write `results.json`, and `detections.json` in COCO's results format."""
    write_json(output_dir / "detections.json", records)
    write_json(
        output_dir / "results.json",
        {
            **values,
            "num_images": len(images),
            "num_detections": len(records),
            "annotations": images.annotations,
            "checkpoint": checkpoint,
        },
    )
