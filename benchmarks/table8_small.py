"""Table 8 of Group Normalization in small: table and curves of docs/results/table8_small.md.

Reads the runs of `i3d-gn grid benchmarks/grids/table8_small.yaml`, one folder for each seed, of the
folds that are finished in all cells: first the six of the paper, then all. Their folders are named
<cell>-<fold>, and cells <norm>_<frames>x<stride>_<clips per worker>.

    python benchmarks/table8_small.py runs/table8_small runs/table8_small_s1 \
        --groups data/fight_surv/list.csv --figure docs/results/table8_small.png
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from i3d_gn.engine.figures import save_figure
from i3d_gn.engine.markdown import markdown_table
from i3d_gn.engine.run_log import read_log
from i3d_gn.video.compare import (
    accuracy,
    comparison,
    difference,
    discordant,
    mcnemar,
    read_entry,
    read_groups,
)

# [GN] Table 8: top-1 on Kinetics-400, by norm and by the columns below.
PAPER = {"bn": (73.3, 72.1, 73.3), "gn": (73.0, 72.8, 74.5)}
COLUMNS = ("8x4_8", "8x4_4", "16x2_4")
COLORS = {"8x4_8": "#0072b2", "8x4_4": "#d55e00", "16x2_4": "#009e73"}  # of Okabe & Ito


Runs = dict[str, list[Path]]  # of each cell
Fold = tuple[Path, str]  # folder of a seed, name


def finished(folders: list[Path]) -> dict[str, dict[Fold, Path]]:
    """Cell -> fold -> its run, of those that have been tested."""
    runs: dict[str, dict[Fold, Path]] = defaultdict(dict)
    for folder in folders:
        for results in sorted(folder.glob("*/test_*/results.json")):
            cell, _, fold = results.parent.parent.name.partition("-")
            runs[cell][folder, fold] = results.parent.parent
    return runs


def on_common_folds(runs: dict[str, dict[Fold, Path]]) -> Runs:
    """Cell -> its runs, of the folds that have been tested in every cell."""
    folds = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    return {cell: [of_cell[fold] for fold in folds] for cell, of_cell in runs.items()}


def of_each_seed(cell: str, runs: list[Path], folders: list[Path]) -> str:
    """The accuracies of a cell with one seed each, where there is more than one."""
    seeds = [[run for run in runs if run.parent == folder] for folder in folders]
    entries = [read_entry(cell, of_seed) for of_seed in seeds if of_seed]
    values = [f"{100 * fmean(entry.correct.values()):.1f}" for entry in entries]
    return f" ({', '.join(values)})" if len(values) > 1 else ""


def main_table(cells: Runs, folders: list[Path], groups: dict[str, str]) -> str:
    """The six cells in the layout of Table 8, and GN against BN in each column."""
    entries = {cell: read_entry(cell, cells[cell]) for cell in cells}
    rows = [["", *(name.replace("_", ", ") + " clips per worker" for name in COLUMNS)]]
    for norm in ("bn", "gn"):
        paper = [f"{value:.1f}" for value in PAPER[norm]]
        rows.append([f"{norm.upper()}, paper (32x2, 8; 32x2, 4; 64x1, 4)", *paper])
        here = [f"{norm}_{column}" for column in COLUMNS]
        values = [
            f"{accuracy(entries[cell], groups)}{of_each_seed(cell, cells[cell], folders)}"
            if cell in cells
            else "not run"
            for cell in here
        ]
        rows.append([f"{norm.upper()}, here", *values])
    last = ["GN - BN, here"]
    for column in COLUMNS:
        gn, bn = entries.get(f"gn_{column}"), entries.get(f"bn_{column}")
        if gn is None or bn is None:
            last.append("")
            continue
        p = f", p = {mcnemar(*discordant(gn, bn)):.2f}" if gn.once and bn.once else ""
        last.append(f"{difference(gn, bn, groups)}{p}")
    return markdown_table([*rows, last])


def draw_curves(cells: Runs, path: Path) -> None:
    """Errors over training in the manner of Fig. 7: BN left, GN right, training dashed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, norm in zip(axes, ("bn", "gn"), strict=True):
        for column in COLUMNS:
            runs = cells.get(f"{norm}_{column}", [])
            if not runs:
                continue
            frames, _, clips = column.partition("_")
            for kind, style in (("train", "--"), ("val", "-")):
                logs = [
                    [x for x in read_log(run / "log.jsonl") if x["kind"] == kind] for run in runs
                ]
                steps = [line["step"] for line in logs[0]]
                errors = np.array([[100 - line["top1"] for line in log] for log in logs])
                if kind == "train":  # three log lines per point, or single videos dominate
                    steps, errors = steps[2::3], errors.reshape(len(runs), -1, 3).mean(2)
                label = f"{frames}, {clips} clips per worker" if kind == "val" else None
                axis.plot(steps, errors.mean(0), style, color=COLORS[column], label=label, lw=1.6)
        axis.set(title=norm.upper(), xlabel="step", xlim=(0, None), ylim=(0, 60))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("error (%)")
    axes[1].legend(frameon=False, title="validation (training dashed)")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, nargs="+", help="output_dir of the grid, for each seed")
    parser.add_argument("--groups", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    groups = read_groups(args.groups, "recording")
    runs = finished(args.runs)
    six = {f"{norm}_{column}" for norm in PAPER for column in COLUMNS}
    cells = on_common_folds({cell: of_cell for cell, of_cell in runs.items() if cell in six})
    print(main_table(cells, args.runs, groups), "\n")
    entries = {cell: read_entry(cell, paths) for cell, paths in on_common_folds(runs).items()}
    reference = "bn_8x4_8"
    rest = [entries[cell] for cell in sorted(entries) if cell != reference]
    print(comparison([entries[reference], *rest], groups))
    if args.figure:
        draw_curves(cells, args.figure)


if __name__ == "__main__":
    main()
