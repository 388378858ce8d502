"""Charts as inline SVG, drawn by matplotlib and colored by the page, in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NUM_COLORS = 7
_MAX_POINTS = 300
_MARKERS = "osD^vPX"

# matplotlib draws in these colors; the page has a variable for each.
_INK, _GRID = "#010101", "#020202"
_SERIES = [f"#0101{number:02x}" for number in range(16, 16 + NUM_COLORS)]
_VARIABLES = {
    _INK: "var(--muted)",
    _GRID: "var(--grid)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES)},
}


@dataclass(frozen=True)
class Line:
    """A curve: `x`, `y`, the number of its run, and how it is drawn."""

    x: Sequence[float]
    y: Sequence[float]
    run: int
    dashed: bool = False
    markers: bool = False
    star: bool = False  # points without a line


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        title: What the vertical axis shows, with its unit.
        description: For those who cannot see it.
        svg: For any width.
        wide_svg: Instead of `svg` where there is room, or None.
    """

    title: str
    description: str
    svg: str
    wide_svg: str | None = None


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    description: str,
    y_range: tuple[float | None, float | None] = (0, None),
    reference: float | None = None,
    has_wide: bool = False,
) -> Chart:
    """Curves over optimizer steps.

    Args:
        title: What the vertical axis shows.
        lines: With at least one point in all.
        description: For those who cannot see it.
        y_range: Limits of the vertical axis; None for those of the data.
        reference: Where to draw a dotted horizontal line.
        has_wide: Draw it a second time, for wide screens.
    """

    def draw(width: float, height: float) -> str:
        with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
            figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
            axes = figure.subplots()
            for line in lines:
                _draw(axes, line)
            if reference is not None:
                axes.axhline(reference, color=_INK, lw=1.2, ls=(0, (1, 3)))
            axes.set_xlabel("step", loc="right", labelpad=1)
            axes.set_xlim(left=0)
            axes.set_ylim(*y_range)
            axes.xaxis.set_major_locator(MaxNLocator(4 if width < 500 else 8, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(_short)
            axes.yaxis.set_major_formatter(_short)
            return _inline_svg(figure, re.sub(r"\W+", "-", f"{title}-{width:.0f}"))

    return Chart(title, description, draw(360, 230), draw(1080, 320) if has_wide else None)


_STYLE = {
    "font.size": 11.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "i3d_gn",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
}


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal numbers of neighboring points, at most `_MAX_POINTS` of them."""
    parts = min(len(x), _MAX_POINTS)
    means = [
        np.array([group.mean() for group in np.array_split(np.asarray(values), parts)])
        for values in (x, y)
    ]
    return means[0], means[1]


def _draw(axes: Axes, line: Line) -> None:
    if not len(line.x):
        return
    color = _SERIES[line.run % NUM_COLORS]
    if line.star:
        axes.plot(line.x, line.y, "*", color=color, ms=12, mec="none", clip_on=False, zorder=3)
        return
    x, y = thin(line.x, line.y)
    axes.plot(
        x, y,
        color=color,
        lw=1.2 if line.dashed else 1.9,
        ls=(0, (3, 2)) if line.dashed else "-",
        marker=_MARKERS[line.run % len(_MARKERS)] if line.markers and len(x) <= 30 else None,
        ms=4.5,
        solid_joinstyle="round",
        clip_on=False,
    )  # fmt: skip


def _short(value: float, _position: float) -> str:
    """A number for an axis: 400k instead of 400000."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:.4g}"


def _inline_svg(figure: Figure, name: str) -> str:
    """SVG without XML header, with colors and ids of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg ", '<svg aria-hidden="true" ', 1)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return re.sub(r"\n\s*", "\n", text)
