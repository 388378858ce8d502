"""Decode every video from beginning to end and report what is broken, before training finds it.

SOURCE is a folder of videos, or any list that `index` reads (then --videos is the folder, and what
the list names but the folder lacks is reported too). Defects are
  missing          listed, but no such file
  no_frames        no bytes, or a video stream without a frame
  no_video_stream  a sound file of something else
  unreadable       no video file, or damaged so that nothing can be decoded
  truncated        frames are missing at the end, or from some damage on
  timestamps       frames without a time, or not later than the one before
  damaged          all frames are there, but parts of some are the decoder's guess
  duplicate        the same pictures as a video before it, in whatever file
  crashed          takes the decoder down
  hung             takes longer than --timeout-seconds
  memory           takes more than --memory-gib

REPORT (JSON) has every video with its defect and reason, or with frames, rate and size. What was
found is kept in REPORT.ledger.jsonl: after a stop the same command continues, and after changes
only new and changed files are decoded.

Exit status: 0, or 1 if more than --max-defects of all videos are defective, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import av

from data_tools.annotations import read_annotations
from data_tools.command_line import (
    add_execution_options,
    new_parser,
    run_command,
    run_script,
    take_execution,
)
from data_tools.examination import examine
from data_tools.files import find_videos, write_json
from data_tools.ledger import file_fingerprint
from data_tools.step import Execution, Item, StepResult, print_unfinished, run_step
from data_tools.video_folder import find_listed_videos, video_folder

DEFECTS = (
    *("missing", "no_frames", "no_video_stream", "unreadable", "truncated", "timestamps"),
    *("damaged", "duplicate", "crashed", "hung", "memory"),
)
_DEFECT_OF_FAILURE = {"timeout": "hung", "memory": "memory", "error": "unreadable"}
_MOST_SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = new_parser("verify_videos", __doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or list, see above")
    parser.add_argument("report", type=Path, metavar="REPORT", help="the report, NAME.json")
    parser.add_argument(
        "--videos", type=Path, metavar="FOLDER", help="where the videos of a list are"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="the split of a list that holds several, see `index`"
    )
    parser.add_argument(
        "--max-defects",
        type=_fraction,
        default=0.05,
        metavar="FRACTION",
        help="exit with status 1 above this share of all videos (default: %(default)g)",
    )
    add_execution_options(parser, timeout_seconds=300)
    arguments = parser.parse_args(argv)
    execution = take_execution(arguments)
    return run_command(
        "verify_videos", lambda: verify_videos(**vars(arguments), execution=execution)
    )


def verify_videos(
    source: Path,
    report: Path,
    *,
    videos: Path | None,
    split: str | None,
    max_defects: float,
    execution: Execution,
) -> int:
    """Write ``report``; the exit status. A shard writes none while videos are left to others.

    Raises ``ValueError`` for a source that cannot be read or holds no video.
    """
    root, paths, missing = _listed(source, videos, split)
    if not paths and not missing:
        raise ValueError(f"{source} holds no video")
    step = run_step(
        partial(_examine_item, root),
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
        execution=execution,
    )
    if execution.dry_run or step.left:
        print_unfinished(step, execution)
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
            "sound": [entry for entry in found if not entry["defect"]],
        },
    )
    share = len(defective) / len(found)
    print(f"{source}: {len(found)} videos, {len(defective)} of them defective ({share:.2%})")
    for name in DEFECTS:
        if counts[name]:
            print(f"  {name}: {counts[name]}")
            of_kind = [entry for entry in defective if entry["defect"] == name]
            for entry in of_kind[:_MOST_SHOWN]:
                print(f"    {entry['path']}: {entry['reason']}")
            if counts[name] > _MOST_SHOWN:
                print(f"    ... and {counts[name] - _MOST_SHOWN} more")
    print(f"report: {report}")
    if share > max_defects:
        print(f"more than {max_defects:.2%} are defective (--max-defects)", file=sys.stderr)
        return 1
    return 0


def _listed(
    source: Path, videos: Path | None, split: str | None
) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """The folder, the videos that are there, each once, and entries for the others."""
    if source.is_dir() and videos is None:
        root = source.absolute()
        paths = find_videos(root)
        there = [path for path in paths if (root / path).is_file()]
        dangling = set(paths) - set(there)
        return root, there, [_missing(path, "a link that leads nowhere") for path in dangling]
    annotations = read_annotations(source, split=split)
    root = video_folder(source, annotations, videos)
    found = find_listed_videos(annotations.videos, root)
    paths = list(dict.fromkeys(file.path for file in found if file.path is not None))
    missing = [
        _missing(video.name, f"no such file ({video.where})")
        for video, file in zip(annotations.videos, found, strict=True)
        if file.path is None
    ]
    return root, paths, missing


def _missing(path: str, reason: str) -> dict[str, Any]:
    return {"path": path, "defect": "missing", "reason": reason}


def _examine_item(root: Path, path: str) -> dict[str, Any]:
    return asdict(examine(root / path))


def _verdicts(paths: list[str], step: StepResult) -> list[dict[str, Any]]:
    """One entry for each path, in their order; of the same pictures the first is no duplicate."""
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
                entry |= {"defect": "duplicate", "reason": f"the same pictures as {original}"}
        entries.append(entry)
    return entries


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    run_script(__file__)
