"""Figures of runs."""

from pathlib import Path

from matplotlib.figure import Figure

from i3d_gn.files import atomic_output


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` atomically, as PNG unless the name of `path` says otherwise."""
    with atomic_output(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix(".") or "png")
