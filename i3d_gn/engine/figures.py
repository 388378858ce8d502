"""Figures of runs."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from i3d_gn.files import atomic_output, check_output, printable

_SUFFIXES = (".png", ".pdf", ".svg")


def check_figure_path(path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse, before work is done, a file that `save_figure` could not write.

    Raises:
        ValueError: The name does not end in a known format, or `check_output` fails.
    """
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: its name must end in {', '.join(_SUFFIXES)}")
    check_output(path, inputs)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` atomically, in the format that the name of `path` says."""
    with atomic_output(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix("."))


def plain_text(name: str) -> str:
    """`name` as text of a figure: no formulas between `$`, and no `_` that hides it in a legend."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
