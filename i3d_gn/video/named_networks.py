"""Networks of other libraries by name: the clips and the input of their published weights."""

from typing import Any, NamedTuple


class _Defaults(NamedTuple):
    """What a config that names the network need not say.

    Attributes:
        num_frames, stride: Of a clip.
        short_side: Range of the short side in training, in pixels.
        crop_size: In training, and of the crops in testing.
        test_short_side: In testing.
        dropout: Before the classifier.
    """

    num_frames: int
    stride: int
    short_side: tuple[int, int]
    crop_size: int
    test_short_side: int
    dropout: float


# torchvision/models/video: transforms and docs of the weights, at 15 frames per second.
_TORCHVISION = {
    "r3d_18": _Defaults(16, 2, (128, 128), 112, 128, 0.0),
    "mc3_18": _Defaults(16, 2, (128, 128), 112, 128, 0.0),
    "r2plus1d_18": _Defaults(16, 2, (128, 128), 112, 128, 0.0),
    "s3d": _Defaults(128, 2, (256, 256), 224, 256, 0.2),
}
# pytorchvideo's model zoo and pytorchvideo_trainer: frames x stride in the names of the weights.
_PYTORCHVIDEO = {
    "slow_r50": _Defaults(8, 8, (256, 320), 224, 256, 0.5),
    "c2d_r50": _Defaults(8, 8, (256, 320), 224, 256, 0.5),
    "i3d_r50": _Defaults(8, 8, (256, 320), 224, 256, 0.5),
    "csn_r101": _Defaults(32, 2, (256, 320), 224, 256, 0.0),
    "r2plus1d_r50": _Defaults(16, 4, (256, 320), 224, 256, 0.5),
    "x3d_xs": _Defaults(4, 12, (182, 228), 160, 182, 0.5),
    "x3d_s": _Defaults(13, 6, (182, 228), 160, 182, 0.5),
    "x3d_m": _Defaults(16, 5, (256, 320), 224, 256, 0.5),
    "slowfast_r50": _Defaults(32, 2, (256, 320), 224, 256, 0.5),
}
# torchvision's VideoClassification preset, and the inputs of Caffe2's Kinetics models.
_TORCHVISION_INPUT = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
_PYTORCHVIDEO_INPUT = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))

# Weights of these networks of pytorchvideo are converted to our own (docs/weights.md).
_READ_AS_I3D = ("i3d_r50", "c2d_r50")

# Options of I3D, which other networks do not have.
I3D_OPTIONS = (
    "stem", "inflate", "pool_padding", "stride_in", "zero_init_last_norm", "checkpoint_stages",
    "kernel_norm",
)  # fmt: skip


def is_adapted(name: str) -> bool:
    """Whether `name` is a network of another library."""
    return name in _TORCHVISION or name in _PYTORCHVIDEO


def network_of_published(source: str) -> str | None:
    """The network of published weights that are not read as I3D; None if `source` is not of one."""
    if source.startswith("pytorchvideo/"):
        name = source.removeprefix("pytorchvideo/")
        return name if is_adapted(name) and name not in _READ_AS_I3D else None
    name, is_enum, _ = source.lower().partition("_weights.")
    return name if is_enum and is_adapted(name) else None


def defaults_of(given: dict[str, Any]) -> dict[str, Any]:
    """Values, by key, for a config that sets the keys `given`."""
    name = given.get("model.name")
    if not isinstance(name, str) or not is_adapted(name):
        return {}
    from_torchvision = name in _TORCHVISION
    network = (_TORCHVISION if from_torchvision else _PYTORCHVIDEO)[name]
    mean, std = _TORCHVISION_INPUT if from_torchvision else _PYTORCHVIDEO_INPUT
    return {
        "model.dropout": network.dropout,
        "data.mean": list(mean),
        "data.std": list(std),
        "clip.num_frames": network.num_frames,
        "clip.stride": network.stride,
        "clip.short_side_min": network.short_side[0],
        "clip.short_side_max": network.short_side[1],
        "clip.crop_size": network.crop_size,
        "test.short_side": network.test_short_side,
        "test.spatial": "three_crop",
    }
