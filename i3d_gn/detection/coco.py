"""Images and objects of COCO, for training and testing, and their average precision."""

import collections
import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from i3d_gn.data.batches import Sample, Stream
from i3d_gn.data.images import ImageReadError, read_image, seed_of
from i3d_gn.detection.config import METRICS, STATISTICS

logger = logging.getLogger(__name__)

_MIN_SIDE = 0.1  # pixels of a box within its image


class DetectionBatch(NamedTuple):
    """A micro-batch of images of any sizes.

    Attributes:
        images: RGB, uint8, (3, H, W) each.
        targets: For each image `boxes` (O, 4), float32, x1 y1 x2 y2 in pixels; `labels` (O,),
            int64, from 1; `masks` (O, H, W), uint8. Empty in testing.
        image_ids: COCO's.
        broken: See `AnyBatch`; always empty, an image that cannot be read is an error.
    """

    images: tuple[Tensor, ...]
    targets: tuple[dict[str, Tensor], ...]
    image_ids: tuple[int, ...]
    broken: tuple[str, ...] = ()


class CocoImages:
    """Images of a folder, and their objects in COCO's format.

    Objects that cannot be trained on are counted and logged: crowds, boxes outside their image,
    empty masks.

    Args:
        folder: Of the images.
        annotations: `instances_*.json`.

    Raises:
        ValueError: The annotations cannot be read or contradict themselves, or an image is missing.
    """

    def __init__(self, folder: str, annotations: str) -> None:
        self.folder, self.annotations = folder, annotations
        self.coco = _read_annotations(folder, annotations)
        self.image_ids = sorted(self.coco.imgs)
        self.category_ids = sorted(self.coco.cats)
        self.labels = {category: i for i, category in enumerate(self.category_ids, 1)}
        self._check_images()
        self.objects = self._usable_objects()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    @property
    def class_names(self) -> list[str]:
        """Names of the categories, in the order of labels."""
        return [str(self.coco.cats[category].get("name")) for category in self.category_ids]

    def path(self, image_id: int) -> str:
        """Of the file of an image."""
        return os.path.join(self.folder, self.coco.imgs[image_id]["file_name"])

    def describe(self) -> str:
        """What identifies the data: images, objects, and the categories."""
        num_objects = sum(map(len, self.objects.values()))
        categories = dict(zip(self.category_ids, self.class_names, strict=True))
        return f"{len(self)} images, {num_objects} objects, {json.dumps(categories)}"

    def targets(self, image_id: int) -> dict[str, Tensor]:
        """The objects of an image, see `DetectionBatch`."""
        image, objects = self.coco.imgs[image_id], self.objects[image_id]
        height, width = image["height"], image["width"]
        boxes = torch.tensor([_clipped_box(o, height, width) for o in objects]).reshape(-1, 4)
        masks = np.stack([self.coco.annToMask(o) for o in objects]) if objects else ()
        masks = torch.as_tensor(np.array(masks, dtype=np.uint8)).reshape(-1, height, width)
        return {
            "boxes": boxes.float(),
            "labels": torch.tensor(
                [self.labels[o["category_id"]] for o in objects], dtype=torch.int64
            ),
            "masks": masks,
        }

    def _check_images(self) -> None:
        for image in self.coco.imgs.values():
            if not {"file_name", "height", "width"} <= image.keys():
                raise ValueError(
                    f"{self.annotations}: image {image['id']} lacks file_name, height or width"
                )
        missing = [i for i in self.image_ids if not os.path.isfile(self.path(i))]
        if missing:
            raise ValueError(
                f"{self.path(missing[0])}: image not found, as {len(missing)} of {len(self)} "
                f"images of {self.annotations}; check the folder of images"
            )

    def _usable_objects(self) -> dict[int, list[dict[str, Any]]]:
        """Objects to train on, by image."""
        objects: dict[int, list[dict[str, Any]]] = {i: [] for i in self.image_ids}
        skipped: collections.Counter[str] = collections.Counter()
        for annotation in self.coco.anns.values():
            where = f"{self.annotations}: annotation {annotation['id']}"
            if annotation["category_id"] not in self.labels:
                raise ValueError(
                    f"{where} has category {annotation['category_id']}, which is not in the list "
                    "of categories"
                )
            if annotation["image_id"] not in objects:
                raise ValueError(
                    f"{where} has image {annotation['image_id']}, which is not in the list of "
                    "images"
                )
            box = annotation.get("bbox")
            if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
                raise ValueError(f"{where} has bbox {box}; expected [x, y, width, height]")
            image = self.coco.imgs[annotation["image_id"]]
            x1, y1, x2, y2 = _clipped_box(annotation, image["height"], image["width"])
            if annotation.get("iscrowd", 0):
                skipped["crowds"] += 1
            elif min(x2 - x1, y2 - y1) < _MIN_SIDE:
                skipped["boxes outside their image"] += 1
            elif not self._mask_area(annotation, where):
                skipped["empty masks"] += 1
            else:
                objects[annotation["image_id"]].append(annotation)
        empty = sum(not of_image for of_image in objects.values())
        counts = ", ".join(f"{n} {what}" for what, n in skipped.items()) or "nothing"
        logger.info(
            "%s: %d images (%d without objects), %d objects; skipped in training: %s",
            self.annotations, len(self), empty, sum(map(len, objects.values())), counts,
        )  # fmt: skip
        return objects

    def _mask_area(self, annotation: dict[str, Any], where: str) -> float:
        """In pixels, of polygons or RLE."""
        from pycocotools import mask as mask_utils  # noqa: PLC0415 (an optional dependency)

        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            if len(polygons) < len(segmentation) or not polygons:
                return 0.0  # pycocotools takes four numbers for a box
        try:
            return float(np.sum(mask_utils.area(self.coco.annToRLE(annotation))))
        except Exception as error:  # pycocotools raises whatever its parsers run into
            raise ValueError(
                f"{where} has a segmentation that is neither polygons nor RLE ({error})"
            ) from error


class TrainingCoco(Dataset[DetectionBatch]):
    """Images with objects, flipped horizontally at random; the key is a list of `Sample`s.

    Flips come from torchvision's v2 transforms, seeded by (seed, stream, position).
    """

    def __init__(self, images: CocoImages, *, seed: int) -> None:
        self.images = images
        self.image_ids = [i for i in images.image_ids if images.objects[i]]
        self.seed = seed
        self.transform = v2.RandomHorizontalFlip()

    def __len__(self) -> int:
        """Number of images with objects."""
        return len(self.image_ids)

    def __getitem__(self, samples: Sequence[Sample]) -> DetectionBatch:
        """The batch of `samples`, in order."""
        ids = tuple(self.image_ids[sample.item] for sample in samples)
        pairs = []
        with torch.random.fork_rng(devices=[]):
            for sample, image_id in zip(samples, ids, strict=True):
                image, target = _read(self.images, image_id), self.images.targets(image_id)
                size: Any = image.shape[-2:]
                boxes: Any = tv_tensors.BoundingBoxes(
                    target["boxes"], format="XYXY", canvas_size=size
                )  # type: ignore[call-overload]
                torch.manual_seed(seed_of(self.seed, Stream.TRAIN_IMAGE, sample.position))
                image, boxes, masks = self.transform(
                    tv_tensors.Image(image), boxes, tv_tensors.Mask(target["masks"])
                )
                target |= {"boxes": _plain(boxes), "masks": _plain(masks)}
                pairs.append((_plain(image), target))
        return DetectionBatch(tuple(i for i, _ in pairs), tuple(t for _, t in pairs), ids)


class TestCoco(Dataset[DetectionBatch]):
    """All images, without targets."""

    __test__ = False  # tells pytest that this is no test class

    def __init__(self, images: CocoImages) -> None:
        self.images = images

    def __getitem__(self, samples: Sequence[Sample]) -> DetectionBatch:
        """The batch of `samples`, in order."""
        ids = tuple(self.images.image_ids[sample.item] for sample in samples)
        return DetectionBatch(tuple(_read(self.images, i) for i in ids), (), ids)


def coco_records(
    image_id: int, detections: Mapping[str, Tensor], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections of an image in COCO's results format, as other tools read it.

    Args:
        image_id: COCO's.
        detections: `boxes` (D, 4), `labels` (D,), `scores` (D,), `masks` (D, 1, H, W) in [0, 1].
        category_ids: COCO's, of labels 1, 2, ...
    """
    from pycocotools import mask as mask_utils  # noqa: PLC0415 (an optional dependency)

    records = []
    masks = (detections["masks"][:, 0] >= 0.5).byte().cpu().numpy()
    for box, label, score, mask in zip(
        detections["boxes"].tolist(),
        detections["labels"].tolist(),
        detections["scores"].tolist(),
        masks,
        strict=True,
    ):
        rle: Any = mask_utils.encode(np.asfortranarray(mask))
        x1, y1, x2, y2 = (round(number, 3) for number in box)
        records.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
                "score": score,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return records


def average_precision(images: CocoImages, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`METRICS` in percent, computed by pycocotools.

    `ap` averages over IoU 0.5 to 0.95; a size without objects has -1.
    """
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415 (an optional dependency)

    if not records:
        return dict.fromkeys(METRICS, 0.0)
    values: dict[str, float] = {}
    iou_types: dict[str, Any] = {"box": "bbox", "mask": "segm"}
    for kind, iou_type in iou_types.items():
        # With a box, pycocotools takes its area for that of the mask.
        dropped = "bbox" if kind == "mask" else "segmentation"
        results = [{k: v for k, v in record.items() if k != dropped} for record in records]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(images.coco, images.coco.loadRes(results), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for name, value in zip(STATISTICS, evaluation.stats, strict=False):
            values[f"{kind}_{name}"] = float(value) * (100 if value >= 0 else 1)
    return values


def _read_annotations(folder: str, annotations: str) -> Any:
    """Pycocotools' `COCO`, by way of torchvision's `CocoDetection`."""
    try:
        import pycocotools  # noqa: F401, PLC0415
    except ImportError as error:
        raise ValueError(
            "COCO needs pycocotools, which is not installed; pip install 'i3d_gn[detection]'"
        ) from error
    if not Path(annotations).is_file():
        raise ValueError(f"{annotations}: annotations not found; expected instances_*.json of COCO")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = CocoDetection(folder, annotations).coco
    except (ValueError, KeyError, TypeError, AssertionError, UnicodeDecodeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{annotations}: not annotations in COCO's format ({reason}); expected lists images, "
            "annotations and categories"
        ) from error
    if not (coco.imgs and coco.cats and coco.anns):
        raise ValueError(
            f"{annotations}: {len(coco.imgs)} images, {len(coco.cats)} categories and "
            f"{len(coco.anns)} annotations; expected at least one of each"
        )
    return coco


def _clipped_box(annotation: Mapping[str, Any], height: int, width: int) -> list[float]:
    x, y, w, h = annotation["bbox"]
    return [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)


def _read(images: CocoImages, image_id: int) -> Tensor:
    """An image as uint8 (3, H, W).

    Raises:
        ValueError: It cannot be read, or has another size than the annotations say.
    """
    path, expected = images.path(image_id), images.coco.imgs[image_id]
    pixels = F.pil_to_tensor(read_image(path))
    if list(pixels.shape[1:]) != [expected["height"], expected["width"]]:
        raise ImageReadError(
            f"{path} has {pixels.shape[2]}x{pixels.shape[1]} pixels, but {images.annotations} says "
            f"{expected['width']}x{expected['height']}; replace it"
        )
    return pixels


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)
