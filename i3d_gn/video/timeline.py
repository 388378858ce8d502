"""The classes of a long video over time: one prediction per window, in memory of one window."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from i3d_gn.data.clips import clip_indices, clip_span, spaced_starts, union_of_clips
from i3d_gn.data.transforms import evaluation_crops
from i3d_gn.data.videos import TestVideo
from i3d_gn.data.windows import Window, sliding_windows
from i3d_gn.engine.figures import save_figure
from i3d_gn.engine.markdown import markdown_table
from i3d_gn.files import printable
from i3d_gn.video.draw import Pixels, check_video_path, write_video
from i3d_gn.video.predict import check_some_decoded, report_broken, video_sources
from i3d_gn.video.recognizer import Recognizer, top_classes
from i3d_gn.video.tables import check_table_path, check_writable, write_table
from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.stream import open_stream

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


def timeline(
    recognizer: Recognizer, path: Path, *, window: float, every: float
) -> Iterator[Moment]:
    """Predict each window of a video as if it were a video of its own, while decoding once.

    A window takes as many clips as cover it, evenly spaced from its start to its end.

    Args:
        recognizer: The network.
        path: The video.
        window: Length of a window, in seconds; the last one may be shorter.
        every: From the start of one window to the next, in seconds.

    Raises:
        VideoDecodeError: At the first frame that cannot be decoded.
        ValueError: Scores are not finite.
    """
    config = recognizer.config
    crops: list[tuple[int, int, int, int]] = []

    def plan_of(height: int, width: int) -> CropPlan:
        mode = config.test.spatial
        plan, crops[:] = evaluation_crops(
            height,
            width,
            short_side=config.test.short_side,
            mode=mode,
            crop_size=None if mode == "full" else config.clip.crop_size,
        )
        return plan

    with open_stream(path, plan_of) as stream:
        for stretch in sliding_windows(
            stream.frames,
            length=window,
            every=every,
            fps=stream.fps,
            in_seconds=True,
            partial=True,
        ):
            video = _as_video(stretch, recognizer, tuple(crops))
            found = recognizer.probabilities(recognizer.score(video), str(path))
            yield Moment(stretch.start_seconds, stretch.end_seconds, found.float().cpu().numpy())


def _as_video(
    window: Window, recognizer: Recognizer, crops: tuple[tuple[int, int, int, int], ...]
) -> TestVideo:
    clip, length = recognizer.config.clip, len(window.frames)
    starts = spaced_starts(
        length,
        num_clips=-(-length // clip_span(clip.num_frames, clip.stride)),
        num_frames=clip.num_frames,
        stride=clip.stride,
        spacing="uniform",
    )
    rows = [
        clip_indices(s, num_frames=clip.num_frames, stride=clip.stride, video_length=length)
        for s in starts.tolist()
    ]
    unique, inverse = union_of_clips(np.stack(rows))
    pixels = [window.frames[i].pixels for i in unique]
    frames = torch.from_numpy(np.stack([p for p in pixels if p is not None]))
    return TestVideo(0, -1, frames, torch.from_numpy(inverse), crops, None)


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
    if out is not None:
        check_table_path(out)
    if render is not None:
        check_video_path(render)
    if plot is not None:
        check_writable(plot)
    sources = video_sources(inputs)
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
                with source.file_of(video) as path:
                    found = timeline(recognizer, path, window=window, every=every)
                    moments = list(tqdm(found, desc=Path(name).name, unit="window"))
                    if render is not None:
                        render_timeline(render, path, moments, recognizer.class_names, top_k)
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


def plot_timeline(path: Path, moments: Sequence[Moment], class_names: tuple[str, ...]) -> None:
    """Plot the probabilities of the classes that are the most probable ones at some time."""
    matrix = np.stack([moment.probabilities for moment in moments])
    winners = np.unique(matrix.argmax(axis=1))
    chosen = sorted(winners, key=lambda k: -matrix[:, k].mean())[:_MOST_CURVES]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    middles = [moment.middle for moment in moments]
    for k in chosen:
        name = class_names[k].replace("$", r"\$")
        axes.plot(middles, matrix[:, k], marker="." if len(moments) < 200 else "", label=name)
    axes.set(xlabel="seconds", ylabel="probability", ylim=(0, 1.02))
    axes.set_xlim(moments[0].start_seconds, moments[-1].end_seconds)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(figure, path)


def render_timeline(
    path: Path, video: Path, moments: Sequence[Moment], class_names: tuple[str, ...], top_k: int
) -> None:
    """Write the video with the classes of the nearest window below each frame."""
    middles = np.array([moment.middle for moment in moments])
    panels: dict[int, Pixels] = {}

    def plan_of(height: int, width: int) -> CropPlan:
        new_width = int(np.clip(width, *_RENDERED_WIDTHS))
        new_height = max(1, height * new_width // width)
        return CropPlan(new_height, new_width, 0, 0, new_height, new_width)

    def drawn() -> Iterator[tuple[float, Pixels]]:
        for frame in stream.frames:
            assert frame.pixels is not None
            nearest = int(np.abs(middles - frame.seconds).argmin())
            if nearest not in panels:
                panels.clear()
                best = top_classes(moments[nearest].probabilities, class_names, top_k)
                panels[nearest] = _panel(best, frame.pixels.shape[1])
            yield frame.seconds, np.concatenate([frame.pixels, panels[nearest]])

    with open_stream(video, plan_of) as stream:
        write_video(path, drawn(), fps=stream.fps)


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
