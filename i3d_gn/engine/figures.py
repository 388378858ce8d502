"""Figures of runs."""

from pathlib import Path

from matplotlib.figure import Figure

from i3d_gn.files import atomic_output, printable

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` atomically, in the format that the name of `path` says."""
    with atomic_output(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix("."))


def plain_text(name: str) -> str:
    """`name` as text of a figure: no formulas between `$`, and no `_` that hides it in a legend."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
