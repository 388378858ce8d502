"""Re-encode a folder of videos to a short side, so that training decodes them fast.

Every video below INPUT is written to the same place below OUTPUT as <name>.mp4: H.264 without
sound, upright, with a short side of at most --short-side (never enlarged) and the frames of the
source: the same number in the same order at the same times, unless --fps sets another rate. A
keyframe at least every --gop frames and the tune fastdecode make random clips fast to read, for 40
to 70 % more bytes than with the defaults of x264.

A video appears in OUTPUT only when complete. OUTPUT/.resize.ledger.jsonl records finished videos:
run the same command again to resume. Only new and changed videos are encoded (a source with another
modification time but the same content is unchanged). Copies made with other options are replaced
only with --overwrite, each when its new copy is complete. Videos with any frame that cannot be
decoded are not written; OUTPUT/resize.report.json (for a shard OUTPUT/resize.I-of-N.report.json)
lists them with reasons.

Exit status: 0, or 1 if no video could be written, 2 for a user error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.command_line import (
    add_run_options,
    new_parser,
    number_between,
    parse_options,
    positive_int,
    run_script,
)
from data_tools.file_status import file_fingerprint, has_size
from data_tools.ledger import Ledger
from data_tools.printing import print_first
from data_tools.probing import decode_error_reason
from data_tools.processes import ItemFailure
from data_tools.step import Item, RunOptions, Shard, print_unfinished, run_step
from data_tools.transcode import transcode
from i3d_gn.files import file_sha256, print_line, remove_unfinished, write_json
from i3d_gn.video_io.decode import VideoDecodeError
from i3d_gn.video_io.find_videos import find_files
from i3d_gn.video_io.h264 import X264Options

PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow"),
)
TUNES = ("none", "film", "animation", "grain", "stillimage", "fastdecode", "zerolatency")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = new_parser("resize", __doc__)
    parser.add_argument("source", type=Path, metavar="INPUT", help="folder of videos")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the copies")
    parser.add_argument(
        "--short-side",
        type=positive_int,
        default=256,
        metavar="PIXELS",
        help="maximum short side of the copies (default: %(default)s)",
    )
    parser.add_argument(
        "--crf",
        type=number_between(0.1, 51),
        default=23,
        help="x264 quality; lower is better and larger (default: %(default)g)",
    )
    parser.add_argument(
        "--gop",
        type=positive_int,
        default=32,
        metavar="FRAMES",
        help="maximum number of frames between keyframes (default: %(default)s)",
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="medium", help="x264 preset (default: %(default)s)"
    )
    parser.add_argument(
        "--tune", choices=TUNES, default="fastdecode", help="x264 tune (default: %(default)s)"
    )
    parser.add_argument(
        "--fps",
        type=number_between(0.01, 1000),
        metavar="RATE",
        help="resample to RATE frames per second (default: the frames of the source)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace copies that were made with other options",
    )
    add_run_options(parser, timeout_seconds=1800)
    options = parse_options(parser, argv)
    x264 = X264Options(
        crf=options.pop("crf"),
        gop=options.pop("gop"),
        preset=options.pop("preset"),
        tune=None if options["tune"] == "none" else options["tune"],
    )
    del options["tune"]
    report = resize_videos(**options, x264=x264)
    if report is None:
        return 0
    report.print_summary()
    return 0 if report.num_written + report.num_kept else 1


@dataclass(frozen=True, kw_only=True)
class ResizeReport:
    """Videos written by this run, kept from earlier runs, and failed (source -> reason).

    `skipped` are files of the source without a video extension, `without_source` the copies of
    videos that are no longer in the source; they stay.
    """

    output: Path
    shard: Shard | None
    num_written: int
    num_kept: int
    num_bytes: int
    failed: dict[str, str]
    skipped: list[str]
    without_source: list[str]

    @property
    def path(self) -> Path:
        """Path of the report."""
        part = "" if self.shard is None else f".{self.shard}"
        return self.output / f"resize{part}.report.json"

    def as_json(self) -> dict[str, Any]:
        """Counts, then failures with reasons."""
        return {
            "num_written": self.num_written,
            "num_kept": self.num_kept,
            "num_failed": len(self.failed),
            "num_bytes": self.num_bytes,
            "num_skipped": len(self.skipped),
            "failed": [{"path": path, "reason": why} for path, why in sorted(self.failed.items())],
            "skipped": self.skipped,
            "without_source": self.without_source,
        }

    def print_summary(self) -> None:
        """Print the counts and the first failures."""
        print_line(
            f"{self.output}: {self.num_written} videos written, {self.num_kept} already there, "
            f"{len(self.failed)} failed; {self.num_bytes / 2**20:.1f} MiB"
        )
        print_first([f"{path}: {reason}" for path, reason in sorted(self.failed.items())])
        if self.skipped:
            print(f"skipped files (not videos): {len(self.skipped)}")
            print_first(self.skipped)
        if self.without_source:
            print(
                f"copies kept though their sources are gone: {len(self.without_source)}; delete "
                "them if they do not belong to the data set anymore"
            )
            print_first(self.without_source)
        print_line(f"report: {self.path}")


def resize_videos(
    source: Path,
    output: Path,
    *,
    short_side: int,
    fps: float | None,
    x264: X264Options,
    overwrite: bool,
    run_options: RunOptions,
) -> ResizeReport | None:
    """Update `output` from `source`; the report is written to `output` and returned.

    A dry run has no report. The report of a shard does not include the videos of other shards.

    Raises:
        ValueError: If `source` has no videos, one of the folders is inside the other, or copies
            were made with other options, without `overwrite`.
    """
    if not source.is_dir():
        raise ValueError(f"folder not found: {source}")
    source, output = source.resolve(), output.resolve()
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise ValueError(f"neither of {source} and {output} may be inside the other")
    if short_side % 2:
        raise ValueError(f"the short side must be even for H.264, not {short_side}")
    videos, skipped = find_files(source)
    if not videos:
        raise ValueError(f"no videos found below {source}")

    outputs, failed = _output_names(source, videos)
    parameters = {"short_side": short_side, "fps": fps, **asdict(x264)}
    ledger_path = output / ".resize.ledger.jsonl"
    known = Ledger(ledger_path)
    if not overwrite:
        _check_earlier_copies(output, outputs, known, parameters)
    items = []
    for video, name in outputs.items():
        fingerprint = [*file_fingerprint(source / video), parameters]
        earlier = known.last(video)
        # If only the modification time differs, the content decides.
        alike = earlier and [earlier[0][0], earlier[0][2:]] == [fingerprint[0], fingerprint[2:]]
        result = earlier[1] if earlier and alike else None
        items.append(Item(key=video, fingerprint=fingerprint, argument=(video, name, result)))
    step = run_step(
        partial(_transcode_item, source, output, short_side=short_side, fps=fps, x264=x264),
        items,
        name="resize",
        ledger_path=ledger_path,
        run_options=run_options,
        # A copy that was deleted or replaced is made again.
        is_intact=lambda video, done: has_size(output / outputs[video], done["num_bytes"]),
        before=lambda todo: remove_unfinished(output, [outputs[video] for video in todo]),
    )
    if run_options.dry_run or step.left:
        print_unfinished(step, run_options)
    if run_options.dry_run:
        return None
    for item in items:
        if item.key in step.failures:
            copy, earlier = output / outputs[item.key], known.last(item.key)
            is_broken = step.kinds[item.key] == "refused"
            if is_broken and earlier and earlier[0][:2] != item.fingerprint[:2]:
                copy.unlink(missing_ok=True)  # It is a copy of an earlier source.
            kept = " (its earlier copy is kept)" if copy.exists() else ""
            failed[item.key] = step.failures[item.key] + kept
    report = ResizeReport(
        output=output,
        shard=run_options.shard,
        num_written=len(step.results) - step.num_kept,
        num_kept=step.num_kept,
        num_bytes=sum(done["num_bytes"] for done in step.results.values()),
        failed=failed,
        skipped=skipped,
        without_source=_without_source(output, outputs, known),
    )
    write_json(report.path, report.as_json())
    return report


def _check_earlier_copies(
    output: Path, outputs: dict[str, str], known: Ledger, parameters: dict[str, Any]
) -> None:
    """Raise `ValueError` if there are copies that were made with other parameters."""
    entries = {name: known.last(video) for video, name in outputs.items()}
    others = {
        name: None if entry is None else entry[0][2]
        for name, entry in entries.items()
        # Without an entry, a run may have been killed between writing and recording it.
        if (entry is None and not known.exists()) or (entry and entry[0][2] != parameters)
    }
    existing = [name for name in others if (output / name).exists()]
    if not existing:
        return
    used = others[existing[0]] or {}
    differences = [f"{k} {used[k]}, now {v}" for k, v in parameters.items() if used.get(k, v) != v]
    raise ValueError(
        f"{output} has {len(existing)} copies made with other options "
        f"({'; '.join(differences) or 'of which there is no record'}), for instance {existing[0]}; "
        "pass --overwrite to replace them, or choose another folder"
    )


def _without_source(output: Path, outputs: dict[str, str], known: Ledger) -> list[str]:
    """Copies that earlier runs made of videos which are gone."""
    current = set(outputs.values())
    earlier = sorted({_copy_name(video) for video in known.known_keys} - current)
    return [name for name in earlier if (output / name).is_file()]


def _copy_name(video: str) -> str:
    return PurePosixPath(video).with_suffix(".mp4").as_posix()


def _output_names(source: Path, videos: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The output of each source, and reasons why others have none."""
    outputs: dict[str, str] = {}
    failed: dict[str, str] = {}
    source_of: dict[str, str] = {}
    for video in videos:
        name = _copy_name(video)
        if not (source / video).is_file():
            failed[video] = "a broken link, or not a regular file"
        elif name in source_of:
            failed[video] = f"its copy would be {name}, the copy of {source_of[name]}"
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
    x264: X264Options,
) -> dict[str, Any]:
    video, name, earlier = item
    source_hash = file_sha256(source / video)
    if (
        earlier is not None
        and earlier["source_hash"] == source_hash
        and has_size(output / name, earlier["num_bytes"])
    ):
        return earlier
    try:
        written = transcode(
            source / video, output / name, short_side=short_side, fps=fps, options=x264
        )
    except VideoDecodeError as error:
        raise ItemFailure(decode_error_reason(error)) from error
    return {**asdict(written), "source_hash": source_hash}


if __name__ == "__main__":
    run_script(__file__)
