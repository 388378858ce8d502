"""Report of an indexing run: as JSON, and as a printed summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.printing import print_first
from data_tools.train_val_split import RandomSplit, SplitPart
from i3d_gn.files import print_line
from i3d_gn.video_io.index_table import UNKNOWN_LABEL
from i3d_gn.video_io.shared_videos import SharedVideo

# Every copy of Kinetics lacks 1 to 5 % of its videos; classes that lack more than this are listed.
THINNED_FRACTION = 0.10
_VERDICTS = ("missing", "duplicated", "undecodable", "empty")


def report_path(index: Path) -> Path:
    """Path of the report of `index`, beside it."""
    return index.with_name(index.name + ".report.json")


@dataclass(frozen=True)
class Rejected:
    """A listed video that is not in the index; `where` is its place in the list."""

    verdict: str
    where: str
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """Counts and rejected videos of one run.

    Attributes:
        num_listed_by_label: Numbers of listed videos by class id.
        num_indexed_by_label: Numbers of indexed videos by class id.
        skipped: Files of a folder that are not videos, or not in a class folder.
        shared: Videos that are also in the index used as label map, or of the validation part that
            are also in the training part.
        random_split: How they were split, None for one index.
        parts: The indexes written: one, or those for training and validation.
    """

    index: Path
    source: Path
    kind: str
    videos: Path
    class_names: list[str]
    shares_class_list: bool
    num_listed: int
    num_indexed: int
    rejected: list[Rejected]
    num_listed_by_label: Counter[int]
    num_indexed_by_label: Counter[int]
    duration_seconds: float
    skipped: list[str]
    shared: list[SharedVideo]
    random_split: RandomSplit | None
    parts: list[SplitPart]

    @property
    def path(self) -> Path:
        """Path of the report."""
        return report_path(self.index)

    def rejected_as(self, verdict: str) -> list[Rejected]:
        """Rejected videos with this verdict: missing, duplicated, undecodable or empty."""
        return [video for video in self.rejected if video.verdict == verdict]

    def thinned_classes(self) -> list[tuple[str, int, int]]:
        """(name, listed, indexed) of classes that lost many videos or have none, worst first.

        Empty if no video has a label, as in the test list.
        """
        thinned = []
        if not any(self.num_listed_by_label[i] for i in range(len(self.class_names))):
            return thinned
        for label, name in enumerate(self.class_names):
            listed, indexed = self.num_listed_by_label[label], self.num_indexed_by_label[label]
            # A source need not have videos of every class of a label map.
            has_none = indexed == 0 and not (listed == 0 and self.shares_class_list)
            if indexed < (1 - THINNED_FRACTION) * listed or has_none:
                thinned.append((name, listed, indexed))
        return sorted(thinned, key=lambda entry: entry[2] / max(entry[1], 1))

    def as_json(self) -> dict[str, Any]:
        """The report as JSON, counts first."""
        return {
            "index": str(self.index),
            "source": str(self.source),
            "kind": self.kind,
            "videos": str(self.videos),
            "num_classes": len(self.class_names),
            "num_listed": self.num_listed,
            "num_indexed": self.num_indexed,
            "duration_hours": round(self.duration_seconds / 3600, 3),
            "num_unlabeled": self.num_indexed_by_label[UNKNOWN_LABEL],
            **{f"num_{verdict}": len(self.rejected_as(verdict)) for verdict in _VERDICTS},
            "num_skipped": len(self.skipped),
            "num_shared_with_label_map": len(self.shared),
            "random_split": None if self.random_split is None else asdict(self.random_split),
            "parts": [
                {"name": part.name, "index": str(part.index), "num_indexed": len(part.records)}
                for part in self.parts
            ],
            "thinned_classes": [
                {"class_name": name, "num_listed": listed, "num_indexed": indexed}
                for name, listed, indexed in self.thinned_classes()
            ],
            "classes": [
                {
                    "label": label,
                    "class_name": name,
                    "num_listed": self.num_listed_by_label[label],
                    "num_indexed": self.num_indexed_by_label[label],
                }
                for label, name in enumerate(self.class_names)
            ],
            **{
                verdict: [
                    {"where": video.where, "path": video.path, "reason": video.reason}
                    for video in self.rejected_as(verdict)
                ]
                for verdict in _VERDICTS
            },
            "skipped": self.skipped,
            "shared_with_label_map": [video._asdict() for video in self.shared],
        }


def print_summary(report: IndexReport) -> None:
    """Print the counts, the first rejected videos with reasons, and the next steps."""
    print_line(
        f"{report.source} ({report.kind}): {report.num_indexed} of {report.num_listed} videos "
        f"usable, {_hours(report.duration_seconds)}, {len(report.class_names)} classes"
    )
    for verdict in _VERDICTS:
        videos = report.rejected_as(verdict)
        if videos:
            print(f"  {verdict}: {len(videos)}")
            print_first([f"{video.path} ({video.where}): {video.reason}" for video in videos])
    num_unlabeled = report.num_indexed_by_label[UNKNOWN_LABEL]
    if num_unlabeled:
        print(f"  unlabeled: {num_unlabeled} of the indexed videos")
    if report.skipped:
        print(f"  skipped files (not videos, or not in a class folder): {len(report.skipped)}")
        print_first(report.skipped)
    if report.shared:
        other = "used as label map" if len(report.parts) < 2 else "for training"
        print_line(f"  warning: {len(report.shared)} videos are also in the index {other}:")
        print_first([f"{v.path}: same {v.equal} as {v.other_path}" for v in report.shared])
    thinned = report.thinned_classes()
    if thinned:
        print(
            f"  warning: {len(thinned)} of {len(report.class_names)} classes lack more than "
            f"{THINNED_FRACTION:.0%} of their videos, or have none:"
        )
        print_first([f"{name}: {indexed} of {listed}" for name, listed, indexed in thinned])
    print_line(f"report: {report.path}")
    if not report.num_indexed:
        print("no usable video, so no index was written")
        return
    if len(report.parts) == 2:
        _print_parts(report)
        return
    print_line(f"index:  {report.index}")
    if not report.shares_class_list and report.class_names:
        print_line(
            f"The class list is from this source. Index the other splits with "
            f"--label-map {report.index}, so that all splits have the same ids."
        )


def _print_parts(report: IndexReport) -> None:
    """Print the indexes for training and validation, and which classes lack one of them."""
    for part in report.parts:
        present = {record.label for record in part.records}
        missing = [name for i, name in enumerate(report.class_names) if i not in present]
        print_line(f"{part.name + ':':7} {len(part.records)} videos, {part.index}")
        if missing:
            print_line(
                f"  warning: {len(missing)} of {len(report.class_names)} classes have no video:"
            )
            print_first(missing)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
