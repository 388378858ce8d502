"""Index the videos of a data set for training and testing.

SOURCE is one of
  official Kinetics CSV        label,youtube_id,time_start,time_end,split   (with --videos)
  JSON of 3D-ResNets-PyTorch   database -> id -> subset, annotations.label  (with --videos)
  JSON of DeepMind's Kinetics  id -> subset, annotations: label, segment    (with --videos)
  JSON of Something-Something  list of id, template                         (with --videos)
  folder of HMDB51 splits      <class>_test_split1.txt, ...                 (with --videos)
  table with a header          columns of paths and labels, e.g. path,label[,split]
  list                         path label    (the label follows the last space)
  folder of class folders      <class>/<video>.mp4
The format is detected from the contents. Fields may be separated by commas, semicolons, tabs or
spaces, paths may lack their extension, and labels may be names or ids. Lists without labels get
them from class folders in their paths, given a --label-map.

Videos named by id are searched in all folders below --videos, as <id>_<start>_<end>.mp4 or
<id>.mp4, or with another extension.

Every video is opened to read its number of frames, frame rate and size. Videos that are missing,
duplicated, empty or cannot be opened are not indexed; OUTPUT.report.json lists them with reasons.
With --split 0.8, four fifths of the videos of every class are for training: NAME_train.parquet and
NAME_val.parquet are written instead of OUTPUT. No video changes from training to validation when
others are added.

Results are recorded in OUTPUT.ledger.jsonl: run the same command again to resume, or to add videos;
only new and changed files are opened.

Exit status: 0, or 1 if no video is usable, 2 for a user error or a malformed source.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av

from data_tools.annotations import read_annotations
from data_tools.class_names import check_folders, label_ids, labels_from_folders
from data_tools.command_line import (
    add_run_options,
    new_parser,
    parse_options,
    run_script,
)
from data_tools.file_status import file_fingerprint
from data_tools.index_report import IndexReport, Rejected, print_summary, report_path
from data_tools.label_map import read_label_map
from data_tools.listed_videos import Annotations, ListedVideo
from data_tools.probing import Probed, probe
from data_tools.step import Item, RunOptions, StepResult, print_unfinished, run_step
from data_tools.train_val_split import (
    RandomSplit,
    SplitPart,
    column_groups,
    recorded_sides,
    split_records,
)
from data_tools.video_folder import find_listed_videos, video_folder
from i3d_gn.files import write_json
from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index
from i3d_gn.video_io.shared_videos import SharedVideo, shared_videos


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = new_parser("index", __doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="list or folder, see above")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the index, NAME.parquet")
    parser.add_argument(
        "--videos",
        type=Path,
        metavar="FOLDER",
        help="folder of the videos (default: the folder of the list)",
    )
    parser.add_argument(
        "--label-map",
        type=Path,
        metavar="FILE",
        help="class list: a file with one name per line in the order of the ids, or lines "
        "`number name`, or a JSON `name: id`, or the index of another split (default: the names "
        "in SOURCE, sorted)",
    )
    parser.add_argument(
        "--split",
        type=_split,
        metavar="NAME|FRACTION",
        help="split to index (train, val, test) of a source that has several; or the fraction of "
        "videos for training, as 0.8, of a source that has none",
    )
    parser.add_argument(
        "--group-by",
        metavar="prefix|folder|COLUMN",
        help="with --split FRACTION, videos that must stay together, such as cuts of one "
        "recording: those whose names are equal up to the last `_`, `-` or space, those in "
        "folders of one name, or those with the same value in a column of the list",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of --split FRACTION, for another split (default: 0)"
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every frame of every video to find broken ones; much slower",
    )
    add_run_options(parser, timeout_seconds=300)
    options = parse_options(parser, argv)
    group_by, seed, split = (options.pop(key) for key in ("group_by", "seed", "split"))
    fraction = split if isinstance(split, float) else None
    if fraction is None and (group_by, seed) != (None, None):
        raise ValueError("--group-by and --seed belong to --split FRACTION; add --split 0.8")
    report = index_videos(
        **options,
        split=None if isinstance(split, float) else split,
        random_split=RandomSplit(fraction, seed or 0, group_by) if fraction else None,
    )
    if report is None:
        return 0
    print_summary(report)
    return 0 if report.num_indexed else 1


def index_videos(
    source: Path,
    output: Path,
    *,
    videos: Path | None,
    label_map: Path | None,
    split: str | None,
    decode: bool,
    run_options: RunOptions,
    random_split: RandomSplit | None = None,
) -> IndexReport | None:
    """Write the index `output` and its report, and return the report.

    With `random_split`, write two indexes instead, see `IndexReport.parts`. Without usable videos,
    only the report is written. After a dry run, and while videos are left to other shards, nothing
    is written and None is returned.

    Raises:
        ValueError: For a source or label map that cannot be read, or if they do not match.
    """
    if output.suffix != ".parquet":
        raise ValueError(f"the index is a Parquet file: name it NAME.parquet, not {output.name}")
    annotations = read_annotations(source, split=split)
    root = video_folder(source, annotations, videos)
    class_names, labels = _class_list_and_ids(source, annotations, label_map)

    rejected: list[Rejected] = []
    groups = column_groups(annotations.videos, random_split, source=source)
    candidates = _candidates(annotations.videos, labels, groups, root, rejected)
    step = _probe_all(
        [candidate.path for candidate in candidates],
        root,
        ledger_path=output.with_name(output.name + ".ledger.jsonl"),
        decode=decode,
        run_options=run_options,
    )
    if run_options.dry_run or step.left:
        print_unfinished(step, run_options)
        return None
    records = []
    for candidate in candidates:
        if candidate.path in step.failures:
            # Not recorded, since the machine may cause a crash or timeout: the next run retries.
            result = Probed(verdict="undecodable", reason=step.failures[candidate.path])
        else:
            result = Probed(**step.results[candidate.path])
        if result.facts is None:
            rejected.append(
                Rejected(result.verdict, candidate.where, candidate.path, result.reason)
            )
        else:
            records.append(VideoRecord(path=candidate.path, label=candidate.label, **result.facts))

    parts = split_records(
        records,
        output,
        random_split,
        {candidate.path: candidate.group for candidate in candidates},
        recorded_sides(output, report_path(output), random_split) if random_split else {},
    )
    for part in parts:
        write_index(part.index, part.records, class_names=class_names, root=root)
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
        skipped=list(annotations.skipped),
        shared=_shared(parts, label_map),
        random_split=random_split,
        parts=parts,
    )
    write_json(report.path, report.as_json())
    return report


def _class_list_and_ids(
    source: Path, annotations: Annotations, label_map: Path | None
) -> tuple[list[str], list[int]]:
    """The class list, and the class id of each video."""
    given = read_label_map(label_map) if label_map else None
    labels = [video.label for video in annotations.videos]
    where = [video.where for video in annotations.videos]
    paths = [video.name if video.is_path else "" for video in annotations.videos]
    if given and not any(label is not None for label in labels):
        labels = labels_from_folders(paths, given.names) or labels
    class_names, ids = label_ids(
        labels,
        where=where,
        label_map=given,
        further_names=annotations.further_class_names,
        source=str(label_map or source),
    )
    check_folders(paths, ids, where=where, class_names=class_names)
    return class_names, ids


def _shared(parts: Sequence[SplitPart], label_map: Path | None) -> list[SharedVideo]:
    """The videos that the index shares with the one that is its label map, or its two parts."""
    if len(parts) == 2:
        train, val = (VideoIndex.load(part.index) for part in parts)
        return shared_videos(val, train)
    if not parts or label_map is None or label_map.suffix != ".parquet":
        return []
    (part,) = parts
    if label_map.samefile(part.index):
        return []
    return shared_videos(VideoIndex.load(part.index), VideoIndex.load(label_map))


def _split(text: str) -> str | float:
    """The name of a split, or a fraction."""
    try:
        fraction = float(text)
    except ValueError:
        if re.match(r"[-+.\d]", text):
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither the name of a split nor a fraction such as 0.8"
            ) from None
        return text
    if not 0 < fraction < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return fraction


@dataclass(frozen=True)
class _Candidate:
    """A listed video whose file exists."""

    path: str
    label: int
    group: str | None
    where: str


def _candidates(
    videos: Sequence[ListedVideo],
    labels: Sequence[int],
    groups: Sequence[str | None],
    root: Path,
    rejected: list[Rejected],
) -> list[_Candidate]:
    """The videos whose files exist, each once, in order; others are added to `rejected`."""
    first: dict[str, _Candidate] = {}
    contradicted: set[str] = set()
    found = find_listed_videos(videos, root)
    for video, label, group, file in zip(videos, labels, groups, found, strict=True):
        if file.path is None:
            rejected.append(Rejected("missing", video.where, video.name, file.reason))
            continue
        for other in file.alternatives:
            reason = f"another file of the same video is used: {file.path}"
            rejected.append(Rejected("duplicated", video.where, other, reason))
        earlier = first.setdefault(file.path, _Candidate(file.path, label, group, video.where))
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
    paths: Sequence[str], root: Path, *, ledger_path: Path, decode: bool, run_options: RunOptions
) -> StepResult:
    """Probe each file; results are `Probed` as dictionaries."""
    items = [
        # The verdict depends on the decoder, so its version is part of the fingerprint.
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
        run_options=run_options,
    )


def _probe_item(root: Path, path: str, *, decode: bool) -> dict[str, Any]:
    return asdict(probe(root, path, decode=decode))


if __name__ == "__main__":
    run_script(__file__)
