"""Where and when a network sees a class: Grad-CAM over space and time.

Selvaraju et al., Grad-CAM, arXiv:1610.02391, with the sums over (H, W) extended to (T, H, W). The
video is cut into clips that follow one another and cover all of it.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from i3d_gn.data.windows import (
    ClipsOf,
    Extent,
    OneClip,
    SlidingWindows,
    TestView,
    all_frames,
)
from i3d_gn.engine.figures import FIGURE_SUFFIXES, plain_text, save_figure
from i3d_gn.files import check_output, print_line
from i3d_gn.video.draw import VIDEO_SUFFIXES, Pixels, heat_overlay, write_video
from i3d_gn.video.recognizer import Recognizer
from i3d_gn.video_io.video_files import VideoFiles, find_videos

_FRAMES_IN_STRIP = 8


@dataclass(frozen=True)
class Evidence:
    """Grad-CAM of a class over a video.

    Attributes:
        maps: float32 (T', H', W') of each clip, not negative.
        num_frames: Frames of the video that each clip covers.
        fps: Of the video.
        peak: The largest value of all maps.
    """

    maps: list[Tensor]
    num_frames: list[int]
    fps: float
    peak: float


def explain(
    video: str,
    checkpoint: str,
    *,
    class_name: str | None,
    stage: str | None,
    out: Path,
    render: Path | None,
    overrides: Sequence[str] = (),
) -> None:
    """Write a picture, and a video, of where and when the network sees a class.

    Args:
        video: A path or URL.
        checkpoint: See `load_network`.
        class_name: The class; None: the predicted one.
        stage: Module of the network whose output is explained; None: its last stage.
        out: PNG file to write.
        render: MP4 file to write, or None.
        overrides: Changes of the network's config, `key=value`.

    Raises:
        ValueError: The video cannot be decoded, there is no such class or stage, or an output
            cannot be written.
    """
    paths = find_videos(video)
    if len(paths) != 1 or Path(video).is_dir():
        raise ValueError(f"{video} is a folder; give one video")
    check_output(out, [video, checkpoint], suffixes=FIGURE_SUFFIXES)
    if render is not None:
        check_output(render, [video, checkpoint], suffixes=VIDEO_SUFFIXES)
    recognizer = Recognizer.from_checkpoint(checkpoint, overrides=overrides)
    names = recognizer.class_names
    target = None if class_name is None else class_id(names, class_name)
    stage = stage or recognizer.network.model.stage_names[-1]
    check_stage(recognizer.network.model, stage)
    with VideoFiles(paths).downloaded() as videos:
        probabilities = recognizer.predict_one(videos).probabilities
        assert probabilities is not None
        target = int(probabilities.argmax()) if target is None else target
        evidence = evidence_of(recognizer, videos, target, stage)
        if evidence.peak == 0:
            raise ValueError(f"{video}: nothing in {stage} speaks for class {names[target]!r}")
        overlays = _overlays(recognizer, videos, evidence)
        title = f"{names[target]} ({probabilities[target]:.3f}), {stage}"
        strip = _Strip(sum(evidence.num_frames))
        if render is None:
            for _ in strip.collect(overlays):
                pass
        else:
            write_video(render, strip.collect(overlays), fps=evidence.fps)
    save_figure(strip.figure(title), out)
    print_line(f"{out}: {title}")


def class_id(names: Sequence[str], name: str) -> int:
    """The id of a class.

    Raises:
        ValueError: There is none of this name; the message names similar ones.
    """
    if name in names:
        return list(names).index(name)
    near = difflib.get_close_matches(name, names, n=3) or names[:3]
    raise ValueError(f"no class {name!r}; similar ones are {', '.join(map(repr, near))}")


def check_stage(model: nn.Module, stage: str) -> None:
    """Raise ValueError if the network has no module of this name."""
    if stage not in dict(model.named_modules()):
        known = ", ".join(getattr(model, "stage_names", ()))
        raise ValueError(f"the network has no module {stage!r}; use one of {known}")


def grad_cam(model: nn.Module, clips: Tensor, target: int, stage: str) -> Tensor:
    """Grad-CAM of class `target`: float32 (N, T', H', W'), the size of the stage's output.

    Each channel is weighted by the mean gradient of the class's logit; negative sums become 0.

    Args:
        model: In eval mode, clips (N, 3, T, H, W) -> logits (N, K).
        clips: Normalized.
        target: Class id.
        stage: Name of a module whose output is (N, C, T', H', W').

    Raises:
        ValueError: The output of `stage` has another shape.
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() != 5:
            raise ValueError(
                f"the output of {stage!r} is not (N, C, T, H, W); choose another module"
            )
        outputs.append(output.detach().requires_grad_())  # backward stops here
        return outputs[-1]

    handle = model.get_submodule(stage).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(clips)
            (gradient,) = torch.autograd.grad(logits[:, target].float().sum(), outputs[-1:])
    finally:
        handle.remove()
    weights = gradient.float().mean(dim=(2, 3, 4), keepdim=True)
    return (weights * outputs[-1].detach().float()).sum(dim=1).relu()


def evidence_of(recognizer: Recognizer, videos: VideoFiles, target: int, stage: str) -> Evidence:
    """Grad-CAM of class `target` over all of the first of `videos`.

    Raises:
        ValueError: The video cannot be decoded, or see `grad_cam`.
    """
    clips_of = OneClip(recognizer.config.clip.stride)
    maps: list[Tensor] = []
    num_frames: list[int] = []
    rate = 0.0
    for part in recognizer.decoded(_windows(recognizer, videos, clips_of)):
        rate = part.fps
        clips = part.frames[part.clips]
        with recognizer.to_device.autocast():
            found = grad_cam(recognizer.network.model, recognizer.to_device(clips), target, stage)
        maps.append(found[0].cpu())
        num_frames.append(part.windows[0].num_frames)
    return Evidence(maps, num_frames, rate, max(float(m.max()) for m in maps))


def _windows(recognizer: Recognizer, videos: VideoFiles, clips_of: ClipsOf) -> SlidingWindows:
    """Stretches of the video that one clip spans, with frames as in testing."""
    clip, test = recognizer.config.clip, recognizer.config.test
    length = Extent(clip.num_frames * max(1, clip.stride), in_seconds=False)
    return SlidingWindows(
        videos,
        [0],
        length=length,
        every=length,
        partial=True,
        clips_of=clips_of,
        view=TestView(test.short_side, "full", clip.crop_size),
    )


def _overlays(
    recognizer: Recognizer, videos: VideoFiles, evidence: Evidence
) -> Iterator[tuple[float, Pixels, Pixels, float]]:
    """Of each frame: time, pixels, pixels with evidence, and the largest evidence in [0, 1]."""
    windows = _windows(recognizer, videos, all_frames)
    for part, cam in zip(recognizer.decoded(windows), evidence.maps, strict=True):
        heats = _heat(cam / evidence.peak, int(part.length), part.frames.shape)
        for seconds, pixels, heat in zip(part.seconds, part.frames.numpy(), heats, strict=True):
            yield seconds, pixels, heat_overlay(pixels, heat), float(heat.max())


def _heat(cam: Tensor, length: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """A map (T', H', W') of a window of `length` frames, for those that it has: (n, H, W).

    In a shorter window the clip loops: a frame has the largest value of all its repetitions.
    `shape` is that of the pixels, (n, H, W, 3).
    """
    num_frames, height, width = shape[:3]
    size = (length, height, width)
    heat = F.interpolate(cam[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]
    heat = F.pad(heat, (0, 0, 0, 0, 0, -length % num_frames))  # to whole loops
    return heat.unflatten(0, (-1, num_frames)).amax(dim=0).clamp(0, 1).numpy()


class _Strip:
    """Collects the frames of the picture while all frames pass by."""

    def __init__(self, num_frames: int) -> None:
        count = min(_FRAMES_IN_STRIP, num_frames)
        self._chosen = [(2 * i + 1) * num_frames // (2 * count) for i in range(count)]
        self._pairs: list[tuple[float, Pixels, Pixels]] = []
        self._seconds: list[float] = []
        self._heat: list[float] = []

    def collect(
        self, overlays: Iterator[tuple[float, Pixels, Pixels, float]]
    ) -> Iterator[tuple[float, Pixels]]:
        """Pass on time and overlay of each frame."""
        for number, (seconds, pixels, overlay, heat) in enumerate(overlays):
            if number in self._chosen:
                self._pairs.append((seconds, pixels, overlay))
            self._seconds.append(seconds)
            self._heat.append(heat)
            yield seconds, overlay

    def figure(self, title: str) -> Figure:
        """Frames, the same with evidence, and the evidence over time."""
        height, width = self._pairs[0][1].shape[:2]
        columns = len(self._pairs)
        side = 1.7
        figure = Figure(
            figsize=(max(4.0, side * columns), 2 * side * height / width + 1.9),
            layout="constrained",
        )
        parts = figure.subfigures(
            2, 1, squeeze=False, height_ratios=[2 * side * height / width + 0.6, 1.3]
        )
        axes = parts[0, 0].subplots(2, columns, squeeze=False)
        for column, (seconds, pixels, overlay) in enumerate(self._pairs):
            for row, picture in enumerate((pixels, overlay)):
                axes[row, column].imshow(picture)
                axes[row, column].axis("off")
            axes[0, column].set_title(f"{seconds:.1f} s", fontsize=8)
        curve = parts[1, 0].subplots()
        curve.plot(self._seconds, self._heat, color="C3", lw=1.2, marker="." if columns < 2 else "")
        curve.fill_between(self._seconds, self._heat, color="C3", alpha=0.15)
        curve.set(xlabel="seconds", ylabel="evidence", ylim=(0, 1.03))
        curve.margins(x=0)
        curve.tick_params(labelsize=8)
        figure.suptitle(plain_text(title), fontsize=10)
        return figure
