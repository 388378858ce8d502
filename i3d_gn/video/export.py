"""Export a trained network to ONNX or torch.export, compared with the original before it is kept.

The exported program takes any number of clips and, if the network is tested on whole frames, of any
size; it returns the scores that testing gives to these clips.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from i3d_gn import __version__
from i3d_gn.data.loader import video_loader
from i3d_gn.data.transforms import normalize_clips
from i3d_gn.data.videos import TestVideo
from i3d_gn.engine.cores import num_workers
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.typed_config import to_yaml
from i3d_gn.files import atomic_output, check_output
from i3d_gn.norm import GroupNorm
from i3d_gn.video import build
from i3d_gn.video.classifier import ClipClassifier, Input
from i3d_gn.video.config import Config
from i3d_gn.video.evaluate import video_scorer
from i3d_gn.video.load import load_network
from i3d_gn.video.trained import TrainedNetwork
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.video_files import VideoFiles

logger = logging.getLogger(__name__)

# The first in which GroupNormalization has a scale and a bias per channel, not per group.
OPSET = 21
# Largest difference of a score, as a share of the largest score: 1e-5 is usual.
TOLERANCE = 1e-3
# Real clips that both compute.
_NUM_VIDEOS, _CLIPS_PER_VIDEO = 4, 2
_CPU = torch.device("cpu")


def export_model(
    source: str | Path, out: Path, *, input: Input = "uint8", videos: Sequence[str] = ()
) -> float:
    """Export a trained network, and print how far its scores are from the original's.

    Args:
        source: See `load_network`.
        out: File to write, `.onnx` or `.pt2`.
        input: Of the exported program: pixels (N, T, H, W, 3) in uint8, normalized inside, or
            normalized clips (N, 3, T, H, W) in float32.
        videos: To compare on; by default videos of the checkpoint's validation index, if it is
            there, else noise.

    Returns:
        The largest difference of a score.

    Raises:
        ValueError: `out` has another suffix or cannot be written, packages are missing, the network
            cannot be loaded, a video cannot be decoded, or the exported program computes something
            else.
    """
    if out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{out}: a network is exported to a file named *.onnx or *.pt2")
    packages = ("onnx", "onnxscript", "onnxruntime") if out.suffix == ".onnx" else ()
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}, which cannot be imported; "
            "pip install 'i3d_gn[export]', or export to *.pt2"
        )
    check_output(out, [source, *videos])
    trained, config = load_network(source, device=_CPU)
    classifier = make_classifier(trained, config, input)
    any_size = config.test.spatial == "full"
    program = trace(classifier, example_clips(config, input), any_size=any_size)
    facts = metadata(trained, config, input, source=str(source), any_size=any_size)
    with atomic_output(out) as temporary:
        if out.suffix == ".onnx":
            write_onnx(program, temporary, facts)
            run = load_onnx(temporary)
        else:
            write_pt2(program, temporary, facts)
            run = load_pt2(temporary)
        described, clips = comparison_clips(config, videos)
        difference, largest = compare(classifier, run, clips, trained)
        if not difference <= TOLERANCE * largest:
            raise ValueError(
                f"{out} not written: scores of the exported program differ by {difference:.2g} "
                f"from the network's, whose largest is {largest:.2g} ({described})"
            )
    size = " of any size" if any_size else ""
    print(
        f"{out}: {len(facts['class_names'])} classes, clips in {input}{size}; scores differ by at "
        f"most {difference:.1e} from the network's, whose largest is {largest:.2g} ({described})"
    )
    if out.suffix == ".onnx" and _has_one_group(classifier):
        logger.warning(
            "TensorRT 10.16 computes a GroupNormalization of one group, which `ln` is, as instance "
            "norm (NVIDIA/TensorRT#4756); compare its scores with ONNX Runtime's"
        )
    return difference


def make_classifier(trained: TrainedNetwork, config: Config, input: Input) -> ClipClassifier:
    """The network as a module from clips to scores, without gradients."""
    to_device = build.to_device(config, Process(0, 1, _CPU), mean=trained.mean, std=trained.std)
    scorer = video_scorer(trained.model, config, to_device)
    classifier = ClipClassifier(
        trained.model,
        mean=trained.mean,
        std=trained.std,
        window=scorer.window,
        average=scorer.average,
        input=input,
    )
    classifier.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return classifier.eval().requires_grad_(False)


def example_clips(config: Config, input: Input, *, seed: int = 0) -> Tensor:
    """Two clips of noise, of the size of a test crop."""
    clip, test = config.clip, config.test
    side = test.short_side if test.spatial == "full" else clip.crop_size
    # A frame that is not square, so that height and width are not one unknown.
    width = side + side // 8 if test.spatial == "full" else side
    generator = torch.Generator().manual_seed(seed)
    shape = (2, clip.num_frames, side, width, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return pixels if input == "uint8" else torch.randn(2, 3, *shape[1:4], generator=generator)


def trace(classifier: ClipClassifier, clips: Tensor, *, any_size: bool) -> ExportedProgram:
    """`torch.export`, for any number of clips and, with `any_size`, any height and width."""
    first = 2 if classifier.input == "uint8" else 3
    sizes = {first: Dim.DYNAMIC, first + 1: Dim.DYNAMIC} if any_size else {}
    with torch.no_grad():
        return torch.export.export(
            classifier, (clips,), dynamic_shapes=({0: Dim.DYNAMIC, **sizes},), strict=False
        )


def metadata(
    trained: TrainedNetwork, config: Config, input: Input, *, source: str, any_size: bool
) -> dict[str, Any]:
    """What a program must know to use the exported network."""
    clip, test = config.clip, config.test
    names = trained.class_names or tuple(f"class {i}" for i in range(config.model.num_classes))
    layout = (
        "uint8 (clips, frames, height, width, RGB)"
        if input == "uint8"
        else "float32 (clips, RGB, frames, height, width), (pixel / 255 - mean) / std"
    )
    return {
        "class_names": list(names),
        "input": layout,
        "output": "probabilities" if test.average == "softmax" else "logits",
        "mean": list(trained.mean),
        "std": list(trained.std),
        "num_frames": clip.num_frames,
        "frame_stride": clip.stride,
        "short_side": test.short_side,
        "size": "any" if any_size else [clip.crop_size, clip.crop_size],
        "clips_per_video": test.num_clips,
        "clip_spacing": test.spacing,
        "source": source,
        "step": trained.step,
        "config": to_yaml(config),
        "i3d_gn": __version__,
    }


def write_onnx(program: ExportedProgram, path: Path, facts: dict[str, Any]) -> None:
    """Write an ONNX file with `facts` as metadata: text, or JSON."""
    for name in ("onnx_ir", "onnxscript"):  # they log every rewritten node
        logging.getLogger(name).setLevel(logging.WARNING)
    converted = torch.onnx.export(
        program,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
        input_names=["clips"],
        output_names=["scores"],
    )
    assert converted is not None
    converted.model.metadata_props.update(
        {key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()}
    )
    converted.save(path, external_data=False)


def write_pt2(program: ExportedProgram, path: Path, facts: dict[str, Any]) -> None:
    """Write a file for `torch.export.load`, with `facts` in its extra file `metadata.json`."""
    buffer = io.BytesIO()  # for a path, torch insists on the suffix
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(facts)})
    path.write_bytes(buffer.getbuffer())


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """What an ONNX file computes on the CPU."""
    import onnxruntime  # noqa: PLC0415 - of an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(clips: Tensor) -> Tensor:
        (scores,) = session.run(None, {"clips": clips.numpy()})
        return torch.from_numpy(scores)

    return run


def load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """What a file of `torch.export` computes."""
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def comparison_clips(config: Config, videos: Sequence[str]) -> tuple[str, Iterator[Tensor]]:
    """What the clips are, and clips in uint8 (N, T, H, W, 3).

    Raises:
        ValueError: A video of `videos` cannot be decoded.
    """
    if videos:
        return f"clips of {', '.join(videos)}", _real_clips(VideoFiles(list(videos)), config, True)
    index = Path(config.data.val_index)
    if index.is_file():
        loaded = build.load_index(str(index), config, labeled=False)
        found = list(islice(_real_clips(loaded, config, False), _NUM_VIDEOS))
        if found:
            return f"clips of {len(found)} videos of {index}", iter(found)
    return "noise; compare real clips with --videos", iter([example_clips(config, "uint8")])


def compare(
    classifier: ClipClassifier,
    run: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    trained: TrainedNetwork,
) -> tuple[float, float]:
    """Largest difference of a score, and the largest score; also one clip by itself."""
    differences, scores = [], []
    for pixels in batches:
        clips = pixels
        if classifier.input == "float":
            clips = normalize_clips(pixels.movedim(-1, 1), trained.mean, trained.std).contiguous()
        expected = classifier(clips)
        differences += [run(clips) - expected, run(clips[:1]) - expected[:1]]
        scores.append(expected)
    # NaN is the largest.
    return torch.cat(differences).abs().max().item(), torch.cat(scores).abs().max().item()


def _real_clips(
    videos: VideoIndex | VideoFiles, config: Config, must_decode: bool
) -> Iterator[Tensor]:
    loader = video_loader(
        build.test_videos(videos, config),
        range(len(videos)),
        num_workers=min(1, num_workers(config, Process(0, 1, _CPU))),
        device=_CPU,
        timeout_seconds=config.data.timeout_seconds,
    )
    for video in loader:
        if video.broken is None:
            yield _clips_of(video)
        elif must_decode:
            raise ValueError(video.broken)


def _clips_of(video: TestVideo) -> Tensor:
    top, left, height, width = video.crops[0]
    rows = video.clips[:_CLIPS_PER_VIDEO]
    crop = video.frames[:, top : top + height, left : left + width]
    return crop[rows.flatten()].unflatten(0, rows.shape).contiguous()


def _has_one_group(classifier: ClipClassifier) -> bool:
    return any(isinstance(m, GroupNorm) and m.num_groups == 1 for m in classifier.modules())
