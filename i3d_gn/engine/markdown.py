"""Tables in Markdown, aligned so that they also read well in a terminal."""

from collections.abc import Sequence

from i3d_gn.files import printable


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of `rows`, the first of which is the header; cells may hold names of files."""
    rows = [[printable(cell).replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
