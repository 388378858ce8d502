"""Predict the classes of videos with a trained network."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from i3d_gn.engine.markdown import markdown_table
from i3d_gn.files import check_output, print_line, printable
from i3d_gn.video.recognizer import Recognizer
from i3d_gn.video.tables import TABLE_SUFFIXES, write_table
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.video_files import VideoFiles, find_videos

_COLUMNS = pa.schema(
    [
        ("video", pa.string()),
        ("rank", pa.int64()),
        ("class", pa.string()),
        ("probability", pa.float64()),
        ("error", pa.string()),
    ]
)


def predict(
    inputs: Sequence[str],
    checkpoint: str,
    *,
    top_k: int,
    out: Path | None,
    overrides: Sequence[str] = (),
) -> None:
    """Print the most probable classes of each video, and write them to `out`.

    Videos that cannot be decoded are listed with the reason, on stderr and in `out`.

    Args:
        inputs: Videos, folders, indexes and URLs.
        checkpoint: See `load_network`.
        top_k: Classes per video.
        out: A .csv, .json or .parquet file with one row per video and class.
        overrides: Changes of the checkpoint's config, `key=value`.

    Raises:
        ValueError: An input or the checkpoint cannot be used, `out` cannot be written, or no video
            could be decoded.
    """
    sources = video_sources(inputs)
    if out is not None:
        check_output(out, [checkpoint, *input_files(inputs, sources)], suffixes=TABLE_SUFFIXES)
    recognizer = Recognizer.from_checkpoint(checkpoint, overrides=overrides)
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    num_videos = sum(map(len, sources))
    with tqdm(total=num_videos, desc="predict", unit="video", disable=num_videos == 1) as bar:
        for source in sources:
            for prediction in recognizer.predict(source):
                if prediction.broken is not None:
                    broken.append(prediction.broken)
                    rows.append({"video": prediction.video, "error": prediction.broken})
                for rank, (name, probability) in enumerate(prediction.top(top_k), start=1):
                    rows.append(
                        {
                            "video": prediction.video,
                            "rank": rank,
                            "class": name,
                            "probability": probability,
                        }
                    )
                bar.update()
    check_some_decoded(broken, num_videos)
    if out is not None:
        write_table(out, _COLUMNS, rows)
    print(_table(rows))
    report_broken(broken)


def video_sources(inputs: Sequence[str]) -> list[VideoIndex | VideoFiles]:
    """The videos of a command line: indexes, and everything else together.

    Raises:
        ValueError: An index or a folder cannot be used, or there is no such file.
    """
    sources: list[VideoIndex | VideoFiles] = []
    files: list[str] = []
    for item in inputs:
        if Path(item).suffix == ".parquet":
            sources.append(VideoIndex.load(item))
        else:
            files += find_videos(item)
    return [VideoFiles(files), *sources] if files else sources


def input_files(
    inputs: Sequence[str], sources: Sequence[VideoIndex | VideoFiles]
) -> Iterator[str | Path]:
    """The files that `inputs` and their videos are, which no output may replace."""
    yield from inputs
    for source in sources:
        if isinstance(source, VideoFiles):
            yield from source.paths
        elif not source.is_packed:
            yield from map(source.path_of, range(len(source)))


def check_some_decoded(broken: Sequence[str], num_videos: int) -> None:
    """Raise ValueError if all videos are broken."""
    if len(broken) == num_videos:
        one = num_videos == 1
        raise ValueError(
            broken[0] if one else f"none of {num_videos} videos could be decoded: {broken[0]}"
        )


def report_broken(broken: Sequence[str]) -> None:
    """List videos that cannot be decoded on stderr."""
    if broken:
        print(f"{len(broken)} videos failed to decode:", file=sys.stderr)
        for line in broken:
            print_line(f"  {line}", file=sys.stderr)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["video", "class", "probability"]]
    for row in rows:
        if "error" not in row:
            name = printable(row["video"]) if row["rank"] == 1 else ""
            lines.append([name, printable(row["class"]), f"{row['probability']:.3f}"])
    return markdown_table(lines)
