"""Split a list of videos into folds for cross-validation, so that a group never spans two folds.

Reads a CSV with columns path, label and, in a third column, the group of each video (such as the
recording it was cut from). Writes `fold<i>_train.csv` and `fold<i>_val.csv`, to be indexed by
`i3d-gn index`. The largest groups are placed first, each into the fold where the classes are then
most even; there is no randomness.

    python benchmarks/make_folds.py data/fight_surv/list.csv data/folds --group recording
"""

import argparse
import collections
import csv
from pathlib import Path

from i3d_gn.files import write_text


def assign_folds(groups: dict[str, collections.Counter[str]], num_folds: int) -> dict[str, int]:
    """The fold of each group, given how many videos of each class it has."""
    folds: list[collections.Counter[str]] = [collections.Counter() for _ in range(num_folds)]
    assigned = {}
    for group in sorted(groups, key=lambda name: (-groups[name].total(), name)):
        counts = [
            sum((fold[label] + n) ** 2 - fold[label] ** 2 for label, n in groups[group].items())
            for fold in folds
        ]
        assigned[group] = counts.index(min(counts))
        folds[assigned[group]].update(groups[group])
    return assigned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("list", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group", default="recording", help="column of the group")
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    with args.list.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        groups[row[args.group]][row["label"]] += 1
    fold_of = assign_folds(groups, args.folds)
    for fold in range(args.folds):
        for part in ("train", "val"):
            chosen = [r for r in rows if (fold_of[r[args.group]] == fold) == (part == "val")]
            lines = ["path,label", *(f"{row['path']},{row['label']}" for row in chosen)]
            write_text(args.output / f"fold{fold}_{part}.csv", "\n".join(lines) + "\n")
            counts = collections.Counter(row["label"] for row in chosen)
            print(f"fold {fold} {part:5}: {len(chosen)} videos, {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    main()
