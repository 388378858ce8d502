"""Micro-batches of still images from class folders, drawn as those of clips are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from i3d_gn.data.batches import ClipBatch, Sample, Stream

_SEED_BITS = 63


class ImageReadError(ValueError):
    """An image that cannot be read, in one line, also where a loader's worker met it."""

    def __init__(self, message: str) -> None:
        # The loader makes such an error again, of the worker's traceback.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class LabelledImages:
    """Paths, labels and class names of a folder with a folder for each class.

    Class ids are positions in the sorted names, as in torchvision's `ImageFolder`.

    Raises:
        ValueError: no such folder, or no class or no image in it.
    """

    def __init__(self, root: str | Path) -> None:
        if not Path(root).is_dir():
            raise ValueError(f"{root}: no such folder; it should hold one folder for each class")
        try:
            folder = ImageFolder(str(root))
        except FileNotFoundError as error:
            raise ValueError(f"{root}: {str(error).splitlines()[0]}") from error
        self.paths = [path for path, _ in folder.samples]
        self.labels = [label for _, label in folder.samples]
        self.class_names: list[str] = folder.classes

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)


class TrainingImages(Dataset[ClipBatch]):
    """Random crops of random size and shape, flipped half the time: [GN]'s augmentation.

    An item's key is a list of `Sample`s. Crop and flip come from torchvision's v2 transforms under
    a seed made of (seed, stream, position), so that they depend on no worker.

    Args:
        images: what there is.
        crop_size: side of the result.
        area_min: smallest share of the image's area that a crop covers.
        seed: of the run.
    """

    def __init__(
        self, images: LabelledImages, *, crop_size: int, area_min: float, seed: int
    ) -> None:
        self.images = images
        self.seed = seed
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(crop_size, scale=(area_min, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __getitem__(self, samples: Sequence[Sample]) -> ClipBatch:
        """The batch of these samples."""
        pixels = []
        with torch.random.fork_rng(devices=[]):
            for sample in samples:
                torch.manual_seed(_seed_of(self.seed, Stream.TRAIN_IMAGE, sample.position))
                pixels.append(self.transform(_read(self.images.paths[sample.video])))
        return _batch(pixels, [self.images.labels[sample.video] for sample in samples])


class CenterImages(Dataset[ClipBatch]):
    """The centre crop after resizing to a short side, as images are validated."""

    def __init__(self, images: LabelledImages, *, short_side: int, crop_size: int) -> None:
        self.images = images
        self.transform = v2.Compose(
            [v2.Resize(short_side, antialias=True), v2.CenterCrop(crop_size)]
        )

    def __getitem__(self, samples: Sequence[Sample]) -> ClipBatch:
        """The batch of these samples."""
        return _batch(
            [self.transform(_read(self.images.paths[sample.video])) for sample in samples],
            [self.images.labels[sample.video] for sample in samples],
        )


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow lets out whatever its parsers trip over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageReadError(
            f"{path}: cannot be read as an image ({reason}); replace it"
        ) from error


def _batch(pixels: list[Image.Image], labels: list[int]) -> ClipBatch:
    """Images are clips without time: uint8 (N, H, W, 3)."""
    return ClipBatch(
        clips=torch.stack([F.pil_to_tensor(image).permute(1, 2, 0) for image in pixels]),
        labels=torch.tensor(labels),
        weights=torch.ones(len(labels)),
        broken=(),
    )


def _seed_of(*key: int) -> int:
    """A seed for torch's generator, which takes one number, of a key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> (64 - _SEED_BITS)
