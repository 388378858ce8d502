"""The classes of a long video over time: one prediction per window, in memory of a few windows."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from i3d_gn.data.clips import clip_indices, spaced_starts
from i3d_gn.data.videos import TestVideo
from i3d_gn.data.windows import Crop, Extent, SlidingWindows, TestView, WindowPart, all_frames
from i3d_gn.engine.figures import FIGURE_SUFFIXES, plain_text, save_figure
from i3d_gn.engine.markdown import markdown_table
from i3d_gn.files import check_output, printable
from i3d_gn.video.draw import VIDEO_SUFFIXES, Pixels, write_video
from i3d_gn.video.predict import (
    check_some_decoded,
    input_files,
    report_broken,
    video_sources,
)
from i3d_gn.video.recognizer import Recognizer, top_classes
from i3d_gn.video.tables import TABLE_SUFFIXES, write_table
from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.video_files import VideoFiles

_COLUMNS = pa.schema(
    [
        ("video", pa.string()),
        ("start_seconds", pa.float64()),
        ("end_seconds", pa.float64()),
        ("rank", pa.int64()),
        ("class", pa.string()),
        ("probability", pa.float64()),
        ("error", pa.string()),
    ]
)
_MOST_CURVES = 8
_RENDERED_WIDTHS = (480, 960)  # pixels; smaller and larger videos are scaled
_LINE_HEIGHT = 24
_FRAMES_PER_PART = 8  # that are sent to be drawn


@dataclass(frozen=True)
class Moment:
    """What a network says of a window of a video; probabilities are float32 (K,)."""

    start_seconds: float
    end_seconds: float
    probabilities: npt.NDArray[np.float32]

    @property
    def middle(self) -> float:
        """In seconds."""
        return (self.start_seconds + self.end_seconds) / 2


@dataclass(frozen=True)
class _CoveringClips:
    """As many clips as cover a window, evenly spaced from its start to its end.

    A clip covers `num_frames` times `stride` frames, as by default in `features` and `explain`.
    """

    num_frames: int
    stride: int

    def __call__(self, num_frames: int, _length: int) -> npt.NDArray[np.int64]:
        """See `SlidingWindows`."""
        covered = self.num_frames * max(1, self.stride)
        starts = spaced_starts(
            num_frames,
            num_clips=-(-num_frames // covered),
            num_frames=self.num_frames,
            stride=self.stride,
            spacing="uniform",
        )
        rows = [
            clip_indices(
                start, num_frames=self.num_frames, stride=self.stride, video_length=num_frames
            )
            for start in starts.tolist()
        ]
        return np.stack(rows)


def timeline(
    recognizer: Recognizer,
    videos: VideoIndex | VideoFiles,
    video: int,
    *,
    window: float,
    every: float,
) -> Iterator[Moment]:
    """Predict each window of a video as if it were a video of its own, while decoding once.

    A window takes as many clips as cover it, evenly spaced from its start to its end.

    Args:
        recognizer: The network.
        videos: Indexed or not.
        video: Number of the video.
        window: Length of a window, in seconds; the last one may be shorter.
        every: From the start of one window to the next, in seconds.

    Raises:
        VideoDecodeError: At the first frame that cannot be decoded.
        ValueError: Scores are not finite.
    """
    clip, test = recognizer.config.clip, recognizer.config.test
    windows = SlidingWindows(
        videos,
        [video],
        length=Extent(window, in_seconds=True),
        every=Extent(every, in_seconds=True),
        by_time=True,
        partial=True,
        clips_of=_CoveringClips(clip.num_frames, clip.stride),
        view=TestView(test.short_side, test.spatial, clip.crop_size),
    )
    for part in recognizer.decoded(windows):
        (span,) = part.windows
        scores = recognizer.score(TestVideo(video, -1, part.frames, part.clips, part.crops, None))
        found = recognizer.probabilities(scores, videos.paths[video])
        yield Moment(span.start_seconds, span.end_seconds, found.float().cpu().numpy())


def predict_timeline(
    inputs: Sequence[str],
    checkpoint: str,
    *,
    window: float,
    every: float,
    top_k: int,
    out: Path | None,
    render: Path | None,
    plot: Path | None,
    overrides: Sequence[str] = (),
) -> None:
    """Print, write, draw and plot the most probable classes of each window of each video.

    Args:
        inputs: Videos, folders, indexes and URLs; a single video for `render` and `plot`.
        checkpoint: See `load_network`.
        window: See `timeline`.
        every: See `timeline`.
        top_k: Classes per window.
        out: A .csv, .json or .parquet file with one row per window and class.
        render: An .mp4 file: the video with the classes below it.
        plot: A PNG file: probabilities over time.
        overrides: Changes of the checkpoint's config, `key=value`.

    Raises:
        ValueError: As `predict`.
    """
    sources = video_sources(inputs)
    read = [checkpoint, *input_files(inputs, sources)]
    if out is not None:
        check_output(out, read, suffixes=TABLE_SUFFIXES)
    if render is not None:
        check_output(render, read, suffixes=VIDEO_SUFFIXES)
    if plot is not None:
        check_output(plot, read, suffixes=FIGURE_SUFFIXES)
    num_videos = sum(map(len, sources))
    if num_videos > 1 and (render or plot):
        raise ValueError(f"{num_videos} videos cannot be drawn; give one video")
    recognizer = Recognizer.from_checkpoint(checkpoint, overrides=overrides)
    rows: list[dict[str, Any]] = []
    lines = [["video", "seconds", "classes"]]
    broken: list[str] = []
    for source in sources:
        for video, name in enumerate(source.paths):
            try:
                with (
                    _kept(source) if render is not None else contextlib.nullcontext(source) as kept
                ):
                    found = timeline(recognizer, kept, video, window=window, every=every)
                    moments = list(tqdm(found, desc=Path(name).name, unit="window"))
                    if render is not None:
                        render_timeline(recognizer, kept, video, moments, top_k, render)
            except VideoDecodeError as error:
                broken.append(str(error))
                rows.append({"video": name, "error": str(error)})
                continue
            if plot is not None:
                plot_timeline(plot, moments, recognizer.class_names)
            for moment in moments:
                best = top_classes(moment.probabilities, recognizer.class_names, top_k)
                between = {
                    "video": name,
                    "start_seconds": moment.start_seconds,
                    "end_seconds": moment.end_seconds,
                }
                for rank, (label, probability) in enumerate(best, start=1):
                    rows.append(
                        {**between, "rank": rank, "class": label, "probability": probability}
                    )
                lines.append(
                    [
                        printable(name) if moment is moments[0] else "",
                        f"{moment.start_seconds:.1f} - {moment.end_seconds:.1f}",
                        ", ".join(f"{printable(label)} {p:.2f}" for label, p in best),
                    ]
                )
    check_some_decoded(broken, num_videos)
    if out is not None:
        write_table(out, _COLUMNS, rows)
    print(markdown_table(lines))
    report_broken(broken)


@contextlib.contextmanager
def _kept(source: VideoIndex | VideoFiles) -> Iterator[VideoIndex | VideoFiles]:
    """Videos that are read twice: those at URLs are downloaded once."""
    if isinstance(source, VideoFiles):
        with source.downloaded() as files:
            yield files
    else:
        yield source


def plot_timeline(path: Path, moments: Sequence[Moment], class_names: tuple[str, ...]) -> None:
    """Plot the probabilities of the classes that are the most probable ones at some time."""
    matrix = np.stack([moment.probabilities for moment in moments])
    winners = np.unique(matrix.argmax(axis=1))
    chosen = sorted(winners, key=lambda k: -matrix[:, k].mean())[:_MOST_CURVES]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    middles = [moment.middle for moment in moments]
    for k in chosen:
        name = plain_text(class_names[k])
        axes.plot(middles, matrix[:, k], marker="." if len(moments) < 200 else "", label=name)
    axes.set(xlabel="seconds", ylabel="probability", ylim=(0, 1.02))
    axes.set_xlim(moments[0].start_seconds, moments[-1].end_seconds)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(figure, path)


def render_timeline(
    recognizer: Recognizer,
    videos: VideoIndex | VideoFiles,
    video: int,
    moments: Sequence[Moment],
    top_k: int,
    out: Path,
) -> None:
    """Write the video with the classes of the nearest window below each frame.

    Raises:
        VideoDecodeError: At the first frame that cannot be decoded.
    """
    middles = np.array([moment.middle for moment in moments])
    panels: dict[int, Pixels] = {}
    some_frames = Extent(_FRAMES_PER_PART, in_seconds=False)
    windows = SlidingWindows(
        videos,
        [video],
        length=some_frames,
        every=some_frames,
        partial=True,
        clips_of=all_frames,
        view=_rendered,
    )

    def drawn(parts: Iterator[WindowPart]) -> Iterator[tuple[float, Pixels]]:
        for part in parts:
            for seconds, pixels in zip(part.seconds, part.frames.numpy(), strict=True):
                nearest = int(np.abs(middles - seconds).argmin())
                if nearest not in panels:
                    panels.clear()
                    probabilities = moments[nearest].probabilities
                    best = top_classes(probabilities, recognizer.class_names, top_k)
                    panels[nearest] = _panel(best, pixels.shape[1])
                yield seconds, np.concatenate([pixels, panels[nearest]])

    parts = recognizer.decoded(windows)
    first = next(parts)
    write_video(out, drawn(itertools.chain([first], parts)), fps=first.fps)


def _rendered(height: int, width: int) -> tuple[CropPlan, list[Crop]]:
    """Whole frames, scaled to the width of the rendered video."""
    new_width = int(np.clip(width, *_RENDERED_WIDTHS))
    new_height = max(1, height * new_width // width)
    plan = CropPlan(new_height, new_width, 0, 0, new_height, new_width)
    return plan, [(0, 0, new_height, new_width)]


def _panel(best: Sequence[tuple[str, float]], width: int) -> Pixels:
    """Bars with names and probabilities: uint8 (H, width, 3)."""
    image = Image.new("RGB", (width, _LINE_HEIGHT * len(best) + 8), (24, 24, 28))
    draw = ImageDraw.Draw(image)
    folder = Path(mpl.get_data_path(), "fonts", "ttf")
    font = ImageFont.truetype(str(folder / "DejaVuSans.ttf"), 14)
    for row, (name, probability) in enumerate(best):
        top = 4 + row * _LINE_HEIGHT
        right = 4 + probability * (width - 8)
        draw.rectangle((4, top + 2, max(5, right), top + _LINE_HEIGHT - 3), fill=(38, 92, 150))
        draw.text((10, top + 3), printable(name), font=font, fill=(240, 240, 240))
        text = f"{probability:.2f}"
        left = width - 10 - draw.textlength(text, font=font)
        draw.text((left, top + 3), text, font=font, fill=(240, 240, 240))
    return np.asarray(image)
