"""Make the index that training and testing read, from a list of videos and the videos.

SOURCE is one of
  official Kinetics CSV        label,youtube_id,time_start,time_end,split   (with --videos)
  JSON of 3D-ResNets-PyTorch   database -> id -> subset, annotations.label  (with --videos)
  CSV with a header            path,label
  list                         path label    the label is what follows the last space
  folder of class folders      <class>/<video>.mp4
It is recognised by its content. Labels may be names or ids.

Videos of the first two are found by id in any folder below --videos, as <id>_<start>_<end>.mp4,
<id>.mp4, or with another extension.

Every video is opened to learn its frames, rate and size. What is missing, listed twice, empty
or cannot be opened is left out, and listed with reasons in OUTPUT.report.json.
What was learnt is kept in OUTPUT.ledger.jsonl: run the same command again to continue after a stop,
or to add videos; only new and changed files are opened.

Exit status: 0, or 1 if no video is usable, 2 for wrong arguments or a malformed source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av

from data_tools.annotations import ListedVideo, read_annotations
from data_tools.class_names import label_ids, read_label_map
from data_tools.command_line import (
    add_execution_options,
    new_parser,
    run_command,
    run_script,
    take_execution,
)
from data_tools.files import write_json
from data_tools.index_report import IndexReport, Rejected, print_summary
from data_tools.ledger import file_fingerprint
from data_tools.probing import Probed, probe
from data_tools.step import Execution, Item, StepResult, print_unfinished, run_step
from data_tools.video_folder import find_listed_videos, video_folder
from i3d_gn.video_io.index import VideoRecord, write_index


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = new_parser("index_videos", __doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="list or folder, see above")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the index, NAME.parquet")
    parser.add_argument(
        "--videos",
        type=Path,
        metavar="FOLDER",
        help="where the videos are (default: the folder of the list)",
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE",
        help="class list: a file with one name a line in the order of the ids, or the index of "
        "another split (default: the names in SOURCE, sorted)",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="the split to take (train, val, test) from a CSV or JSON that holds several",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every frame of every video to find broken ones; far slower than opening",
    )
    add_execution_options(parser, timeout_seconds=300)
    arguments = parser.parse_args(argv)
    execution = take_execution(arguments)

    def command() -> int:
        report = index_videos(**vars(arguments), execution=execution)
        if report is None:
            return 0
        print_summary(report)
        return 0 if report.num_indexed else 1

    return run_command("index_videos", command)


def index_videos(
    source: Path,
    output: Path,
    *,
    videos: Path | None,
    label_map: Path | None,
    split: str | None,
    decode: bool,
    execution: Execution,
) -> IndexReport | None:
    """Write the index ``output`` and ``output.report.json``; the report is returned as well.

    If nothing is usable there is a report but no index; None and neither of them after a dry run,
    or while videos are left to other shards. Raises ``ValueError`` for a source or
    label map that cannot be read or do not fit each other.
    """
    if output.suffix != ".parquet":
        raise ValueError(f"the output is a Parquet file: call it NAME.parquet, not {output.name}")
    given_names = read_label_map(label_map) if label_map else None
    annotations = read_annotations(source, split=split)
    root = video_folder(source, annotations, videos)
    class_names, labels = label_ids(
        [video.label for video in annotations.videos],
        where=[video.where for video in annotations.videos],
        class_names=given_names,
        further_names=annotations.further_class_names,
        source=str(label_map or source),
    )

    rejected: list[Rejected] = []
    candidates = _candidates(annotations.videos, labels, root, rejected)
    step = _probe_all(
        [candidate.path for candidate in candidates],
        root,
        ledger_path=output.with_name(output.name + ".ledger.jsonl"),
        decode=decode,
        execution=execution,
    )
    if execution.dry_run or step.left:
        print_unfinished(step, execution)
        return None
    records = []
    for candidate in candidates:
        if candidate.path in step.failures:
            # A crash or a time-out may be the machine's fault: tried again next time.
            result = Probed(verdict="undecodable", reason=step.failures[candidate.path])
        else:
            result = Probed(**step.results[candidate.path])
        if result.facts is None:
            rejected.append(
                Rejected(result.verdict, candidate.where, candidate.path, result.reason)
            )
        else:
            records.append(VideoRecord(path=candidate.path, label=candidate.label, **result.facts))

    if records:
        write_index(output, records, class_names=class_names, root=root)
    report = IndexReport(
        index=output,
        source=source,
        kind=annotations.kind,
        videos=root,
        class_names=class_names,
        shares_class_list=label_map is not None,
        num_listed=len(annotations.videos),
        num_indexed=len(records),
        rejected=rejected,
        num_listed_by_label=Counter(labels),
        num_indexed_by_label=Counter(record.label for record in records),
        duration_seconds=sum(record.duration_seconds for record in records),
    )
    write_json(report.path, report.as_json())
    return report


@dataclass(frozen=True)
class _Candidate:
    """A listed video that is there, once."""

    path: str
    label: int
    where: str


def _candidates(
    videos: Sequence[ListedVideo], labels: Sequence[int], root: Path, rejected: list[Rejected]
) -> list[_Candidate]:
    """The videos that are there, in the list's order; adds the others to ``rejected``."""
    first: dict[str, _Candidate] = {}
    contradicted: set[str] = set()
    found = find_listed_videos(videos, root)
    for video, label, file in zip(videos, labels, found, strict=True):
        if file.path is None:
            rejected.append(Rejected("missing", video.where, video.name, "no such file"))
            continue
        for other in file.alternatives:
            reason = f"another file of the same video, {file.path}, is used"
            rejected.append(Rejected("duplicated", video.where, other, reason))
        earlier = first.setdefault(file.path, _Candidate(file.path, label, video.where))
        if earlier.where == video.where:
            continue
        reason = f"listed before at {earlier.where}"
        if earlier.label != label:
            contradicted.add(file.path)
            reason += " with another label, so neither is used"
        rejected.append(Rejected("duplicated", video.where, file.path, reason))
    for path in sorted(contradicted):
        reason = "listed again with another label, so neither is used"
        rejected.append(Rejected("duplicated", first.pop(path).where, path, reason))
    return list(first.values())


def _probe_all(
    paths: Sequence[str], root: Path, *, ledger_path: Path, decode: bool, execution: Execution
) -> StepResult:
    """What each file is: ``Probed`` as a dictionary."""
    items = [
        # Another decoder may come to another verdict, so its version counts as well.
        Item(
            key=path,
            fingerprint=[*file_fingerprint(root / path), decode, av.__version__],
            argument=path,
        )
        for path in paths
    ]
    return run_step(
        partial(_probe_item, root, decode=decode),
        items,
        name="index",
        ledger_path=ledger_path,
        execution=execution,
    )


def _probe_item(root: Path, path: str, *, decode: bool) -> dict[str, Any]:
    return asdict(probe(root, path, decode=decode))


if __name__ == "__main__":
    run_script(__file__)
