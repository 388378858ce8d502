"""Published weights by name, downloaded once into the cache of torch.hub."""

import logging
import re
import warnings
from pathlib import Path
from urllib.parse import urlparse

import torch
import torchvision

logger = logging.getLogger(__name__)

_TORCHVISION_ENUM = re.compile(
    r"(ResNet50|ResNet101|VGG16|VGG16_BN|R3D_18|MC3_18|R2Plus1D_18|S3D)_Weights\.\w+"
)
_PYTORCHVIDEO_ZOO = "pytorchvideo/"
_ZOO_NAMES = (
    "i3d_r50", "c2d_r50", "slow_r50", "csn_r101", "r2plus1d_r50", "x3d_xs", "x3d_s", "x3d_m",
    "slowfast_r50",
)  # fmt: skip
# File names of torchvision's weights end in the first digits of their SHA-256.
_SHA256_PREFIX = re.compile(r"-([0-9a-f]+)\.")


def is_torchvision_name(source: str) -> bool:
    """Whether `source` names weights of torchvision (`ResNet50_Weights.IMAGENET1K_V2`)."""
    return _TORCHVISION_ENUM.fullmatch(source) is not None


def is_published_name(source: str) -> bool:
    """Whether `source` names weights of torchvision or of pytorchvideo's zoo."""
    return is_torchvision_name(source) or source.startswith(_PYTORCHVIDEO_ZOO)


def download_weights(name: str) -> Path:
    """The file of published weights, downloaded unless it is in the cache.

    Args:
        name: Name for which `is_published_name` is true.

    Raises:
        ValueError: There are no weights of this name, the download failed, or its SHA-256 differs.
    """
    url = _torchvision_url(name) if is_torchvision_name(name) else _zoo_url(name)
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if path.exists():
        return path
    logger.info("downloading %s to %s", url, path)
    sha256_prefix = _SHA256_PREFIX.search(path.name) if is_torchvision_name(name) else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url,
            str(path),
            hash_prefix=None if sha256_prefix is None else sha256_prefix[1],
            progress=False,
        )
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(
            f"weights {name}: could not download {url} ({reason}); check the connection, or "
            "download the file elsewhere and give its path"
        ) from error
    return path


def _torchvision_url(name: str) -> str:
    try:
        return torchvision.models.get_weight(name).url
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"torchvision has no weights {name!r}: {error}") from error


def _zoo_url(name: str) -> str:
    with warnings.catch_warnings():
        # It scripts functions on import, which torch has deprecated.
        warnings.filterwarnings("ignore", message=r".torch\.jit\.")
        from pytorchvideo.models.hub import (  # noqa: PLC0415 slow import
            csn,
            r2plus1d,
            resnet,
            slowfast,
            x3d,
        )  # fmt: skip
    zoo_name = name.removeprefix(_PYTORCHVIDEO_ZOO)
    if zoo_name not in _ZOO_NAMES:
        raise ValueError(
            f"weights {name}: not supported; of pytorchvideo's zoo use one of "
            f"{', '.join(_PYTORCHVIDEO_ZOO + known for known in _ZOO_NAMES)}"
        )
    libraries = (resnet, csn, r2plus1d, x3d, slowfast)
    return next(m.checkpoint_paths[zoo_name] for m in libraries if zoo_name in m.checkpoint_paths)
