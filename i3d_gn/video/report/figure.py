"""One figure of runs: clips that they trained on, error over training, accuracy in testing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from i3d_gn.engine.figures import plain_text, save_figure
from i3d_gn.video.report.charts import thin
from i3d_gn.video.report.curves import chance_error
from i3d_gn.video.report.page import describe
from i3d_gn.video.report.runs import Run

# Of Okabe and Ito, darkened where they are too light for lines: distinct with any color vision.
_COLORS = ("#0072b2", "#d55e00", "#008a64", "#b0508a", "#8f6b00", "#2f93d0", "#555b66")
_INK, _MUTED = "#1c2027", "#5b626d"
_MAX_STRIPS = 4
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": "#c9c6c0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10.5,
    "axes.titlepad": 10,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": "#e4e2dd",
}


def plot(runs: list[Run], path: Path) -> None:
    """Write the figure, atomically."""
    first = next((run.strips for run in runs if run.strips), [])
    captions = [strip.caption for strip in first]
    repeats = [captions[:i].count(caption) for i, caption in enumerate(captions)]
    order = sorted(range(len(first)), key=lambda i: (repeats[i], i))  # as many classes as possible
    strips = [first[i] for i in order[:_MAX_STRIPS]]
    tested = any(run.test is not None for run in runs)
    with mpl.rc_context(_STYLE):
        widths = [*([1.15] if strips else []), 1.2, *([1] if tested else [])]
        height = max(3.5, 0.7 * len(runs) + 0.6) if tested else 3.5
        layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1)
        figure = Figure(figsize=(3.9 * len(widths), height), layout=layout)
        parts = list(figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0])
        if strips:
            _draw_strips(parts.pop(0), strips)
        _draw_errors(parts.pop(0).subplots(), runs, has_legend=not tested)
        if tested:
            _draw_accuracies(parts.pop(0).subplots(), runs)
        save_figure(figure, path)


def _draw_strips(part: SubFigure, strips: list[Any]) -> None:
    panels = part.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, strip in zip(panels, strips, strict=True):
        axes.imshow(strip.pixels, aspect="equal")
        axes.set_axis_off()
        axes.text(
            0,
            1.04,
            plain_text(strip.caption),
            transform=axes.transAxes,
            va="bottom",
            fontsize=9,
            color=_MUTED,
        )
    title = {"fontsize": 10.5, "fontweight": "bold", "loc": "left", "pad": 20}
    panels[0].set_title("Training clips, as the network sees them", **title)


def _draw_errors(axes: Axes, runs: list[Run], *, has_legend: bool) -> None:
    """Training dashed, validation solid, as in [GN] Fig. 7; the multi-clip test as a star."""
    for number, run in enumerate(runs):
        color = _COLORS[number % len(_COLORS)]
        for kind, style in (("train", "--"), ("val", "-")):
            steps, values = run.curve(kind, "top1")
            if steps:
                x, y = thin(steps, values)
                solid = kind == "val"
                axes.plot(
                    x, 100 - y, style, color=color, lw=2 if solid else 1,
                    alpha=1 if solid else 0.75, label=plain_text(run.name) if solid else None,
                )  # fmt: skip
        results = {} if run.test is None else run.test.results
        if "top1" in results and results["step"] is not None:
            error = 100 - results["top1"]
            axes.plot(
                results["step"], error, "*", ms=13, color=color, mec="white", clip_on=False,
                zorder=3,
            )  # fmt: skip
    chance = chance_error(runs)
    if chance is not None:
        axes.axhline(chance, color=_MUTED, lw=1, ls=":")
        axes.annotate(
            "chance", (1, chance), xycoords=axes.get_yaxis_transform(), xytext=(4, 0),
            textcoords="offset points", va="center", color=_MUTED, fontsize=9,
        )  # fmt: skip
    axes.set_title("Error (%): training dashed, validation solid")
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    if has_legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _draw_accuracies(axes: Axes, runs: list[Run]) -> None:
    """A bar for each run, named in its color."""
    results = [{} if run.test is None else run.test.results for run in runs]
    values = [float(found.get("top1", np.nan)) for found in results]
    rows = np.arange(len(runs))
    colors = [_COLORS[number % len(_COLORS)] for number in rows]
    axes.barh(rows, np.nan_to_num(values), color=colors, height=0.3)
    for row, (run, value) in enumerate(zip(runs, values, strict=True)):
        offset = {"textcoords": "offset points", "va": "bottom", "annotation_clip": False}
        axes.annotate(
            plain_text(run.name),
            (0, row - 0.15),
            xytext=(0, 15),
            color=colors[row],
            weight="bold",
            **offset,
        )
        axes.annotate(
            describe(run), (0, row - 0.15), xytext=(0, 3), color=_MUTED, fontsize=9, **offset
        )
        label = "not tested" if np.isnan(value) else f"{value:.1f}"
        axes.text(np.nan_to_num(value) + 1.5, row, label, va="center", fontweight="bold")
    num_clips = {found["num_clips"] for found in results if "num_clips" in found}
    clips = f", {num_clips.pop()} clips" if len(num_clips) == 1 else ""
    axes.set_title(f"Test accuracy (%){clips}")
    axes.set_xlim(0, 112)
    axes.set_ylim(len(runs) - 0.6, -0.75)
    axes.set_axis_off()
