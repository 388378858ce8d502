"""Trained networks compared video by video, on the scores of their multi-clip tests.

Two accuracies over the same videos are not independent: what counts is on how many videos exactly
one of the two is right (McNemar 1947). And videos cut from one recording are not independent
either, so intervals resample whole groups of videos (the cluster bootstrap: Field & Welsh 2007).
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from i3d_gn.engine.markdown import markdown_table
from i3d_gn.video.config import load_config
from i3d_gn.video.report.runs import find_test, read_test

RESAMPLES = 10_000


@dataclass(frozen=True)
class Entry:
    """What is compared: the tests of one or more runs, of other folds or seeds, taken together.

    Attributes:
        name: For the table.
        num_runs: That have been tested.
        correct: Path of a video -> fraction of the runs that tested it whose top-1 is right.
        once: Whether each video was tested by one run.
    """

    name: str
    num_runs: int
    correct: dict[str, float]
    once: bool


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def read_entry(name: str, folders: Sequence[Path]) -> Entry:
    """Read the tests of runs; runs that have not been tested yet are ignored.

    Raises:
        ValueError: No run in `folders` has been tested on labeled videos, or scores are damaged.
    """
    hits: dict[str, list[bool]] = {}
    num_runs = 0
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            continue
        found = find_test(folder, load_config(folder / "config.yaml"))
        if found is None:
            continue
        num_runs += 1
        test = read_test(*found)
        right = (test.predictions == test.labels).tolist()
        for path, is_right in zip(test.paths, right, strict=True):
            hits.setdefault(path, []).append(is_right)
    if not hits:
        raise ValueError(f"{name}: none of {len(folders)} runs has been tested with labels")
    return Entry(
        name=name,
        num_runs=num_runs,
        correct={path: sum(values) / len(values) for path, values in hits.items()},
        once=all(len(values) == 1 for values in hits.values()),
    )


def read_groups(path: Path, column: str) -> dict[str, str]:
    """The group of each video: columns `path` and `column` of a CSV file.

    Raises:
        ValueError: The file cannot be read, has no such columns, or a video has no group or two.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error
    if not rows or not {"path", column} <= rows[0].keys():
        raise ValueError(f"{path} must be a CSV file with the columns path and {column}")
    groups: dict[str, str] = {}
    for row in rows:
        video, group = row["path"], row[column]
        if not group or groups.setdefault(video, group) != group:
            other = f"{groups[video]!r} and " if video in groups else ""
            raise ValueError(
                f"{path}: the {column} of {video} is {other}{group or ''!r}; each video needs one"
            )
    return groups


def accuracy(entry: Entry, groups: dict[str, str]) -> Interval:
    """Top-1 accuracy in percent; `groups` as for `difference`."""
    paths = sorted(entry.correct)
    values = np.array([100 * entry.correct[path] for path in paths])
    return _bootstrap(values, _group_ids(paths, groups))


def difference(entry: Entry, other: Entry, groups: dict[str, str]) -> Interval:
    """Accuracy of `entry` minus that of `other`, in points, over the videos that both tested.

    `groups` maps paths to groups that are resampled together; without any, each video is one.

    Raises:
        ValueError: There are groups, but a video has none.
    """
    paths = sorted(entry.correct.keys() & other.correct.keys())
    values = np.array([100 * (entry.correct[path] - other.correct[path]) for path in paths])
    return _bootstrap(values, _group_ids(paths, groups))


def discordant(entry: Entry, other: Entry) -> tuple[int, int]:
    """How many videos only `entry` gets right, and how many only `other`."""
    paths = entry.correct.keys() & other.correct.keys()
    pairs = [(entry.correct[path], other.correct[path]) for path in paths]
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of the exact McNemar test: are the discordant videos split evenly?"""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def comparison(entries: Sequence[Entry], groups: dict[str, str]) -> str:
    """A Markdown table: each entry, and how it differs from the first.

    The p-value is given where each video was tested once; runs that differ in the seed are not
    independent tests of a video.
    """
    first = entries[0]
    rows = [
        ["", "runs", "videos", "top-1 (%) [95 %]", f"minus {first.name}",
         f"only it / only {first.name}", "McNemar p"]
    ]  # fmt: skip
    for entry in entries:
        row = [entry.name, str(entry.num_runs), str(len(entry.correct))]
        row.append(str(accuracy(entry, groups)))
        if entry is first:
            row += ["", "", ""]
        elif not entry.correct.keys() & first.correct.keys():
            row += ["no video in common", "", ""]
        else:
            only_it, only_first = discordant(entry, first)
            once = entry.once and first.once
            row.append(str(difference(entry, first, groups)))
            row.append(f"{only_it} / {only_first}" if once else "-")
            p = mcnemar(only_it, only_first)
            row.append("-" if not once else "< 0.001" if p < 0.001 else f"{p:.3f}")
        rows.append(row)
    return markdown_table(rows)


def _group_ids(paths: Sequence[str], groups: dict[str, str]) -> npt.NDArray[np.intp]:
    if not groups:
        return np.arange(len(paths))
    if without := [path for path in paths if path not in groups]:
        raise ValueError(
            f"{len(without)} of {len(paths)} videos have no group, the first is {without[0]}; list "
            "all of them, by their paths in the index"
        )
    _, ids = np.unique([groups[path] for path in paths], return_inverse=True)
    return ids


def _bootstrap(values: npt.NDArray[np.float64], group: npt.NDArray[np.intp]) -> Interval:
    """The mean of `values`, with the percentiles of its cluster bootstrap."""
    sums, counts = np.bincount(group, weights=values), np.bincount(group)
    # How often each group is drawn; a seed, so that a table can be made again.
    draws = np.random.default_rng(0).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES
    )
    means = (draws @ sums) / (draws @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))
