"""Print long lists of findings in a few lines; reports hold all of them."""

from __future__ import annotations

from collections.abc import Sequence

from i3d_gn.files import print_line

_MOST_SHOWN = 5


def print_first(findings: Sequence[str]) -> None:
    """Print the first findings, indented, one per line, and how many more there are."""
    for finding in findings[:_MOST_SHOWN]:
        print_line(f"    {finding}")
    if len(findings) > _MOST_SHOWN:
        print(f"    ... and {len(findings) - _MOST_SHOWN} more")
