"""Re-encode a folder of videos to a short side, in the form that training decodes fastest.

Every video below INPUT is written to the same place below OUTPUT as <name>.mp4: H.264 without
sound, upright, its short side at most --short-side (never enlarged), with the frames of the source:
as many, in the same order, at the same times, unless --fps asks for another rate. A keyframe every
--gop frames at least and the tune fastdecode make random clips cheap to read, for 40 to 70 % more
bytes than x264's defaults.

A video appears in OUTPUT only when complete. OUTPUT/.resize.ledger.jsonl records what is done: run
the same command again to continue after a stop; only new and changed videos, or all after a change
of options, are encoded (a source with another time but the same content is not). What fails, a
video with a broken frame included, is left out and listed with reasons in
OUTPUT/resize.report.json, or that of a shard in OUTPUT/resize.I-of-N.report.json.

Exit status: 0, or 1 if no video could be written, 2 for wrong arguments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import av

from data_tools.command_line import (
    add_execution_options,
    new_parser,
    positive_float,
    positive_int,
    run_command,
    run_script,
    take_execution,
)
from data_tools.files import file_hash, find_videos, remove_unfinished, write_json
from data_tools.h264 import X264Options
from data_tools.ledger import Ledger, file_fingerprint
from data_tools.probing import decode_error_reason
from data_tools.processes import ItemFailure
from data_tools.step import Execution, Item, Shard, print_unfinished, run_step
from data_tools.transcode import transcode
from i3d_gn.video_io.decode import VideoDecodeError

PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow"),
)
TUNES = ("none", "film", "animation", "grain", "stillimage", "fastdecode", "zerolatency")
_MOST_SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = new_parser("resize_videos", __doc__)
    parser.add_argument("source", type=Path, metavar="INPUT", help="folder of videos")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the copies")
    parser.add_argument(
        "--short-side",
        type=positive_int,
        default=256,
        metavar="PIXELS",
        help="of the copies, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--crf",
        type=positive_float,
        default=23,
        help="x264 quality, lower is better and larger (default: %(default)g)",
    )
    parser.add_argument(
        "--gop",
        type=positive_int,
        default=32,
        metavar="FRAMES",
        help="most frames from one keyframe to the next (default: %(default)s)",
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="medium", help="x264 preset (default: %(default)s)"
    )
    parser.add_argument(
        "--tune", choices=TUNES, default="fastdecode", help="x264 tune (default: %(default)s)"
    )
    parser.add_argument(
        "--fps",
        type=positive_float,
        metavar="RATE",
        help="resample to so many frames a second (default: the frames of the source)",
    )
    add_execution_options(parser, timeout_seconds=1800)
    arguments = parser.parse_args(argv)
    execution = take_execution(arguments)

    def command() -> int:
        report = resize_videos(
            arguments.source,
            arguments.output,
            short_side=arguments.short_side,
            options=X264Options(
                crf=arguments.crf,
                gop=arguments.gop,
                preset=arguments.preset,
                tune=None if arguments.tune == "none" else arguments.tune,
            ),
            fps=arguments.fps,
            execution=execution,
        )
        if report is None:
            return 0
        report.print_summary()
        return 0 if report.num_written + report.num_kept else 1

    return run_command("resize_videos", command)


@dataclass(frozen=True, kw_only=True)
class ResizeReport:
    """Videos written now, kept from earlier runs, and failed (source -> reason)."""

    output: Path
    shard: Shard | None
    num_written: int
    num_kept: int
    num_bytes: int
    failed: dict[str, str]

    @property
    def path(self) -> Path:
        """Where the report is written."""
        part = "" if self.shard is None else f".{self.shard}"
        return self.output / f"resize{part}.report.json"

    def as_json(self) -> dict[str, Any]:
        """Counts first, then what failed and why."""
        return {
            "num_written": self.num_written,
            "num_kept": self.num_kept,
            "num_failed": len(self.failed),
            "num_bytes": self.num_bytes,
            "failed": [{"path": path, "reason": why} for path, why in sorted(self.failed.items())],
        }

    def print_summary(self) -> None:
        """Print the counts and the first failures."""
        print(
            f"{self.output}: {self.num_written} videos written, {self.num_kept} there already, "
            f"{len(self.failed)} failed; {self.num_bytes / 2**20:.1f} MiB"
        )
        for path, reason in sorted(self.failed.items())[:_MOST_SHOWN]:
            print(f"    {path}: {reason}")
        if len(self.failed) > _MOST_SHOWN:
            print(f"    ... and {len(self.failed) - _MOST_SHOWN} more")
        print(f"report: {self.path}")


def resize_videos(
    source: Path,
    output: Path,
    *,
    short_side: int,
    fps: float | None,
    options: X264Options,
    execution: Execution,
) -> ResizeReport | None:
    """Bring ``output`` up to date with ``source``; the report is written there and returned.

    A dry run has none. That of a shard says nothing of what others have yet to do.

    Raises ``ValueError`` if ``source`` holds no video or one of the folders lies in the other.
    """
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    source, output = source.resolve(), output.resolve()
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise ValueError(f"{source} and {output} must be folders apart from each other")
    if short_side % 2:
        raise ValueError(f"the short side must be even, as H.264 needs it, not {short_side}")
    videos = find_videos(source)
    if not videos:
        raise ValueError(f"{source} holds no video")

    outputs, failed = _output_names(source, videos)
    parameters = {"short_side": short_side, "fps": fps, **asdict(options), "av": av.__version__}
    ledger_path = output / ".resize.ledger.jsonl"
    known = Ledger(ledger_path)
    items = []
    for video, name in outputs.items():
        fingerprint = [*file_fingerprint(source / video), parameters]
        earlier = known.last(video)
        # What was done may differ from what is wanted by the source's time alone.
        alike = earlier and [earlier[0][0], earlier[0][2:]] == [fingerprint[0], fingerprint[2:]]
        result = earlier[1] if earlier and alike else None
        items.append(Item(key=video, fingerprint=fingerprint, argument=(video, name, result)))
    step = run_step(
        partial(_transcode_item, source, output, short_side=short_side, fps=fps, options=options),
        items,
        name="resize",
        ledger_path=ledger_path,
        execution=execution,
        # The size as well, since whoever deletes or replaces a copy wants it made again.
        is_intact=lambda video, done: _size_of(output / outputs[video]) == done["num_bytes"],
        before=lambda todo: remove_unfinished(output, {outputs[video] for video in todo}),
    )
    if execution.dry_run or step.left:
        print_unfinished(step, execution)
    if execution.dry_run:
        return None
    failed.update(step.failures)
    report = ResizeReport(
        output=output,
        shard=execution.shard,
        num_written=len(step.results) - step.num_kept,
        num_kept=step.num_kept,
        num_bytes=sum(done["num_bytes"] for done in step.results.values()),
        failed=failed,
    )
    write_json(report.path, report.as_json())
    return report


def _output_names(source: Path, videos: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The output of each source, and what has none since another source has it already."""
    outputs: dict[str, str] = {}
    failed: dict[str, str] = {}
    source_of: dict[str, str] = {}
    for video in videos:
        name = PurePosixPath(video).with_suffix(".mp4").as_posix()
        if not (source / video).is_file():
            failed[video] = "a link that leads nowhere"
        elif name in source_of:
            failed[video] = f"its copy would be {name}, which is that of {source_of[name]}"
        else:
            source_of[name] = video
            outputs[video] = name
    return outputs, failed


def _transcode_item(
    source: Path,
    output: Path,
    item: tuple[str, str, dict[str, Any] | None],
    *,
    short_side: int,
    fps: float | None,
    options: X264Options,
) -> dict[str, Any]:
    video, name, earlier = item
    source_hash = file_hash(source / video)
    if (
        earlier is not None
        and earlier["source_hash"] == source_hash
        and earlier["num_bytes"] == _size_of(output / name)
    ):
        return earlier
    # Should this fail, no copy of an earlier source or with other options may pass for its result.
    (output / name).unlink(missing_ok=True)
    try:
        written = transcode(
            source / video, output / name, short_side=short_side, fps=fps, options=options
        )
    except VideoDecodeError as error:
        raise ItemFailure(decode_error_reason(error)) from error
    return {**asdict(written), "source_hash": source_hash}


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    run_script(__file__)
