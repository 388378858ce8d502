"""Micro-batches of still images from class folders, sampled in the same way as clips."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from i3d_gn.data.batches import Batch, Sample, Stream
from i3d_gn.files import check_regular

_SEED_BITS = 63


class ImageReadError(ValueError):
    """An image that cannot be read; a one-line message, also when raised in a loader worker."""

    def __init__(self, message: str) -> None:
        # The loader raises the error again in the parent, with a traceback in the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class LabeledImages:
    """Paths, labels and class names of a folder with one subfolder per class.

    Class ids are positions in the sorted names, as in torchvision's `ImageFolder`.

    Raises:
        ValueError: The folder does not exist, or has no class or no image.
    """

    def __init__(self, root: str | Path) -> None:
        if not Path(root).is_dir():
            raise ValueError(f"{root}: folder not found; expected one subfolder per class")
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


class TrainingImages(Dataset[Batch]):
    """Random resized crops and horizontal flips, the augmentation of [GN] section 4.1.

    The key of an item is a list of `Sample`s. Crop and flip come from torchvision's v2 transforms,
    seeded by (seed, stream, position), so that they do not depend on the worker.

    Args:
        images: The images.
        crop_size: Side of the square result, in pixels.
        area_min: Smallest fraction of the image's area that a crop covers.
        seed: Of the run.
    """

    def __init__(
        self, images: LabeledImages, *, crop_size: int, area_min: float, seed: int
    ) -> None:
        self.images = images
        self.seed = seed
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(crop_size, scale=(area_min, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __getitem__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of `samples`, in order."""
        pixels = []
        with torch.random.fork_rng(devices=[]):
            for sample in samples:
                torch.manual_seed(seed_of(self.seed, Stream.TRAIN_IMAGE, sample.position))
                pixels.append(self.transform(read_image(self.images.paths[sample.item])))
        return _batch(pixels, [self.images.labels[sample.item] for sample in samples])


class CenterImages(Dataset[Batch]):
    """Center crops after resizing the short side: the images of validation."""

    def __init__(self, images: LabeledImages, *, short_side: int, crop_size: int) -> None:
        self.images = images
        self.transform = v2.Compose(
            [v2.Resize(short_side, antialias=True), v2.CenterCrop(crop_size)]
        )

    def __getitem__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of `samples`, in order."""
        return _batch(
            [self.transform(read_image(self.images.paths[sample.item])) for sample in samples],
            [self.images.labels[sample.item] for sample in samples],
        )


def read_image(path: str) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        ImageReadError: It is not a regular file, or cannot be decoded.
    """
    try:
        check_regular(path)
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises whatever its parsers run into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageReadError(
            f"{path}: cannot be read as an image ({reason}); replace it"
        ) from error


def _batch(pixels: list[Image.Image], labels: list[int]) -> Batch:
    """A batch of uint8 images (N, H, W, 3)."""
    return Batch(
        inputs=torch.stack([F.pil_to_tensor(image).permute(1, 2, 0) for image in pixels]),
        labels=torch.tensor(labels),
        weights=torch.ones(len(labels)),
        broken=(),
    )


def seed_of(*key: int) -> int:
    """One number from several, which is what torch's generator takes as a seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> (64 - _SEED_BITS)
