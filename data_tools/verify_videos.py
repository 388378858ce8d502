"""Decode every video completely and report defects, before training meets them.

SOURCE is a folder of videos, or any list that `i3d-gn index` reads (then --videos is the folder,
and listed videos without a file are reported too). Defects are
  missing          listed, but the file does not exist
  no_frames        an empty file, or a video stream without frames
  no_video_stream  a valid file of something else, e.g. sound
  unreadable       not a video file, or damaged so that no frame can be decoded
  truncated        frames are missing at the end, or after damage
  timestamps       frames without timestamp, or timestamps that do not increase
  damaged          all frames can be decoded, but errors in some are concealed by the decoder
  duplicate        the same frames as an earlier video, in any file format
  crashed          crashes the decoder
  hung             takes longer than --timeout-seconds
  memory           takes more than --memory-gib

REPORT (JSON) lists every video with its defect and reason, or with its number of frames, frame rate
and size. Results are recorded in REPORT.ledger.jsonl: run the same command again to resume; only
new and changed files are decoded.

Exit status: 0, or 1 if more than --max-defects of all videos have defects, 2 for a user error.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import av

from data_tools.annotations import read_annotations
from data_tools.command_line import (
    add_run_options,
    new_parser,
    number_between,
    parse_options,
    run_script,
)
from data_tools.file_status import file_fingerprint
from data_tools.full_decode_check import check_video
from data_tools.printing import print_first
from data_tools.step import Item, RunOptions, StepResult, print_unfinished, run_step
from data_tools.video_folder import find_listed_videos, video_folder
from i3d_gn.files import print_line, write_json
from i3d_gn.video_io.find_videos import find_files

DEFECTS = (
    *("missing", "no_frames", "no_video_stream", "unreadable", "truncated", "timestamps"),
    *("damaged", "duplicate", "crashed", "hung", "memory"),
)
_DEFECT_OF_FAILURE = {"timeout": "hung", "memory": "memory", "error": "unreadable"}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = new_parser("verify", __doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or list, see above")
    parser.add_argument("report", type=Path, metavar="REPORT", help="the report, NAME.json")
    parser.add_argument(
        "--videos", type=Path, metavar="FOLDER", help="folder of the videos of a list"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="split of a list that has several, see `i3d-gn index`"
    )
    parser.add_argument(
        "--max-defects",
        type=number_between(0, 1),
        default=0.05,
        metavar="FRACTION",
        help="exit with status 1 if more than this share has defects (default: %(default)g)",
    )
    add_run_options(parser, timeout_seconds=300)
    return verify_videos(**parse_options(parser, argv))


def verify_videos(
    source: Path,
    report: Path,
    *,
    videos: Path | None,
    split: str | None,
    max_defects: float,
    run_options: RunOptions,
) -> int:
    """Write `report` and return the exit status.

    Nothing is written after a dry run, and while videos are left to other shards.

    Raises:
        ValueError: For a source that cannot be read or has no videos.
    """
    root, paths, missing = _listed(source, videos, split)
    if not paths and not missing:
        raise ValueError(f"no videos found in {source}")
    step = run_step(
        partial(_check_item, root),
        [
            Item(
                key=path,
                fingerprint=[*file_fingerprint(root / path), av.__version__],
                argument=path,
            )
            for path in paths
        ],
        name="verify",
        ledger_path=report.with_name(report.name + ".ledger.jsonl"),
        run_options=run_options,
    )
    if run_options.dry_run or step.left:
        print_unfinished(step, run_options)
        return 0
    found = [*missing, *_verdicts(paths, step)]
    defective = [entry for entry in found if entry["defect"]]
    counts = {name: sum(e["defect"] == name for e in defective) for name in DEFECTS}
    seconds = sum(entry.get("duration_seconds", 0.0) for entry in found if not entry["defect"])
    write_json(
        report,
        {
            "source": str(source),
            "videos": str(root),
            "num_videos": len(found),
            "num_defective": len(defective),
            "duration_hours": round(seconds / 3600, 3),
            **{f"num_{name}": count for name, count in counts.items()},
            "defective": defective,
            "valid": [entry for entry in found if not entry["defect"]],
        },
    )
    share = len(defective) / len(found)
    print_line(f"{source}: {len(found)} videos, {len(defective)} with defects ({share:.2%})")
    for name in DEFECTS:
        if counts[name]:
            print(f"  {name}: {counts[name]}")
            print_first([f"{e['path']}: {e['reason']}" for e in defective if e["defect"] == name])
    print_line(f"report: {report}")
    if share > max_defects:
        print(f"more than {max_defects:.2%} have defects (--max-defects)", file=sys.stderr)
        return 1
    return 0


def _listed(
    source: Path, videos: Path | None, split: str | None
) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """The folder, the existing videos, each once, and report entries for missing ones."""
    if source.is_dir() and videos is None:
        root = source.absolute()
        files = find_files(root)
        if files.others:
            print(f"skipped files (not videos): {len(files.others)}")
            print_first(files.others)
        there = [path for path in files.videos if os.path.isfile(root / path)]
        dangling = sorted(set(files.videos) - set(there))
        return (
            root,
            there,
            [_missing(path, "a broken link, or not a regular file") for path in dangling],
        )
    annotations = read_annotations(source, split=split)
    root = video_folder(source, annotations, videos)
    found = find_listed_videos(annotations.videos, root)
    paths = list(dict.fromkeys(file.path for file in found if file.path is not None))
    missing = [
        _missing(video.name, f"{file.reason} ({video.where})")
        for video, file in zip(annotations.videos, found, strict=True)
        if file.path is None
    ]
    return root, paths, missing


def _missing(path: str, reason: str) -> dict[str, Any]:
    return {"path": path, "defect": "missing", "reason": reason}


def _check_item(root: Path, path: str) -> dict[str, Any]:
    return asdict(check_video(root / path))


def _verdicts(paths: list[str], step: StepResult) -> list[dict[str, Any]]:
    """One report entry per path, in order; of equal videos, the first is not a duplicate."""
    first_with: dict[str, str] = {}
    entries = []
    for path in paths:
        if path in step.failures:
            kind = _DEFECT_OF_FAILURE.get(step.kinds[path] or "", "crashed")
            entries.append({"path": path, "defect": kind, "reason": step.failures[path]})
            continue
        result = step.results[path]
        entry = {"path": path, "defect": result["defect"], "reason": result["reason"]}
        if result["facts"]:
            entry |= result["facts"]
            original = first_with.setdefault(result["content"], path)
            if original != path and not entry["defect"]:
                entry |= {"defect": "duplicate", "reason": f"the same frames as {original}"}
        entries.append(entry)
    return entries


if __name__ == "__main__":
    run_script(__file__)
