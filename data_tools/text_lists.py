"""Read lists of videos in text files: official Kinetics CSVs, tables with a header, `path label`.

Tables and lists may use commas, semicolons, tabs or spaces. A header is recognized by its column
names, or because it looks unlike all other lines. A table may have a column `split`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.listed_videos import (
    Annotations,
    ListedVideo,
    parse_label,
    segment_name,
    select_split,
)
from i3d_gn.video_io.find_videos import is_video_name

# Names of columns in use, in order of preference.
_PATH_COLUMNS = (
    *("path", "video_path", "clip_path", "file_path", "filepath", "filename", "file_name", "file"),
    *("video_name", "videoname", "video", "clip_name", "clip", "name", "video_id", "id"),
)
_LABEL_COLUMNS = (
    *("label", "class", "class_name", "classname", "label_name", "category", "action", "tag"),
    *("target", "label_id", "class_id"),
)
_SPLIT_COLUMN = "split"
# The delimiter follows the file name in `a, b.mp4,3` and `clip,3`, but not in `a, b.mp4 3`.
_DELIMITER_AFTER_EXTENSION = re.compile(r'.*\.\w{2,4}"?[,;](?P<label>[^,;/]+)')
_DELIMITER_AFTER_STEM = re.compile(r"[^\s,;.]+(?:;(?P<label>[^;/]+)|,(?P<id>[^,;/.]+))")
_SINGLE_NAME = re.compile(r"[^\s,;]+")
_COLUMN_NAME = re.compile(r"[A-Za-z_][\w ]*")


def read_text_list(source: Path, *, split: str | None) -> Annotations:
    """Read `source`, in the format that its lines show.

    Raises:
        ValueError: For malformed lines.
    """
    try:
        return _read(source, source.read_text("utf-8-sig").lstrip("\r\n"), split=split)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not a UTF-8 text file: {error}") from None
    except csv.Error as error:
        raise ValueError(
            f"{source} is not a list of videos: {error}; is a quote not closed?"
        ) from None


def _read(source: Path, text: str, *, split: str | None) -> Annotations:
    lines = {
        f"{source.name}:{i}": line.strip()
        for i, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    }
    first, *others = lines or [""]
    delimiter = _delimiter(lines.get(first, ""))
    header = _split_fields(lines.get(first, ""))
    if "youtube_id" in header and delimiter is not None:
        return _read_official_csv(source, text, delimiter=delimiter, split=split)
    is_table = bool(lines) and _is_header(lines[first], [lines[where] for where in others])
    if split is not None and not (is_table and delimiter and _SPLIT_COLUMN in header):
        raise ValueError(f"{source} has no splits, so --split {split} does not apply")
    if not is_table:
        return Annotations(kind="`path label` list", videos=_parse_lines(lines))
    del lines[first]
    path_column, label_column = _choose_columns(source, header)
    kind = f"table, videos in column {path_column!r}, " + (
        f"labels in column {label_column!r}" if label_column else "no labels"
    )
    if delimiter is None:
        return Annotations(kind=kind, videos=_parse_lines(lines))
    required = (path_column, label_column) if label_column else (path_column,)
    rows = list(_table_rows(source, text, delimiter=delimiter, required=required))
    videos = [
        ListedVideo(
            name=row[path_column],
            label=parse_label(row[label_column], where=where) if label_column else None,
            where=where,
            is_path=True,
            columns=row,
        )
        for where, row in rows
    ]
    splits = [row.get(_SPLIT_COLUMN) or "" for _, row in rows]
    return Annotations(kind=kind, videos=select_split(source, videos, splits, split=split))


def _read_official_csv(
    source: Path, text: str, *, delimiter: str, split: str | None
) -> Annotations:
    """`label,youtube_id,time_start,time_end,split[,is_cc]`; the test list has no label."""
    videos, splits = [], []
    required = ("youtube_id", "time_start", "time_end")
    for where, row in _table_rows(source, text, delimiter=delimiter, required=required):
        youtube_id = row["youtube_id"]
        try:
            start, end = int(row["time_start"]), int(row["time_end"])
        except ValueError:
            raise ValueError(
                f"{where}: time_start and time_end must be integer seconds, not "
                f"{row['time_start']!r} and {row['time_end']!r}"
            ) from None
        videos.append(
            ListedVideo(
                name=segment_name(youtube_id, start, end),
                video_id=youtube_id,
                label=row.get("label") or None,
                where=where,
                is_path=False,
                columns=row,
            )
        )
        splits.append(row.get(_SPLIT_COLUMN) or "")
    return Annotations(
        kind="official Kinetics CSV", videos=select_split(source, videos, splits, split=split)
    )


def _is_header(first_line: str, other_lines: Sequence[str]) -> bool:
    """Whether the first line of a list names its columns."""
    fields = _split_fields(first_line)
    is_sentence = _delimiter(first_line) is None and len(fields) > 2
    if is_sentence or any(is_video_name(field) or field.isdecimal() for field in fields):
        return False
    if _first_of(_PATH_COLUMNS, fields) or (_first_of(_LABEL_COLUMNS, fields) and len(fields) > 1):
        return True
    if len(fields) != 2 or not other_lines or not all(map(_COLUMN_NAME.fullmatch, fields)):
        return False
    try:
        others = [_parse_line(line, where="") for line in other_lines]
    except ValueError:
        return False
    return all(is_video_name(video.name) for video in others) or all(
        isinstance(video.label, int) for video in others
    )


def _choose_columns(source: Path, header: Sequence[str]) -> tuple[str, str | None]:
    """The columns of paths and of labels, the latter None if there is only one column."""
    header = [name for name in header if name != _SPLIT_COLUMN]
    path_column, label_column = _first_of(_PATH_COLUMNS, header), _first_of(_LABEL_COLUMNS, header)
    if len(header) == 1:
        return header[0], None
    if len(header) == 2:
        if path_column is None:
            path_column = next((name for name in header if name != label_column), None)
        label_column = next((name for name in header if name != path_column), None)
    if path_column is None or label_column is None:
        raise ValueError(
            f"{source}: which columns of {', '.join(header)} are the videos and labels? Name them "
            "path and label"
        )
    return path_column, label_column


def _first_of(names: Sequence[str], header: Sequence[str]) -> str | None:
    by_lower_case = {name.lower(): name for name in header}
    return next((by_lower_case[name] for name in names if name in by_lower_case), None)


def _delimiter(line: str) -> str | None:
    """The delimiter of a line, None for spaces."""
    return next((delimiter for delimiter in "\t;," if delimiter in line), None)


def _split_fields(line: str) -> list[str]:
    delimiter = _delimiter(line)
    if delimiter is None:
        return line.split()
    return [field.strip() for field in next(csv.reader([line], delimiter=delimiter))]


def _parse_lines(lines: dict[str, str]) -> list[ListedVideo]:
    """The entries of `lines` (place -> text) without a header."""
    if all(map(_SINGLE_NAME.fullmatch, lines.values())):
        return [
            ListedVideo(name=line, label=None, where=where, is_path=True)
            for where, line in lines.items()
        ]
    return [_parse_line(line, where=where) for where, line in lines.items()]


def _parse_line(line: str, *, where: str) -> ListedVideo:
    """Parse `path label`, or the `path` of a video alone.

    The label follows a tab, a comma or semicolon after the file name, or else the last space: paths
    may contain spaces.
    """
    match = _DELIMITER_AFTER_EXTENSION.fullmatch(line) or _DELIMITER_AFTER_STEM.fullmatch(line)
    if is_video_name(line):
        path, label = line, ""
    elif "\t" in line:
        path, _, label = line.rpartition("\t")
    elif match:
        label = match[match.lastgroup or "label"]
        path = line[: -len(label) - 1]
    elif len(line.split()) > 1:
        path, label = line.rsplit(None, 1)
    else:
        raise ValueError(
            f"{where}: {line!r} is neither `path label` nor the path of a video; see --help for "
            "the supported formats"
        )
    return ListedVideo(
        name=path.strip().strip('"'),
        label=parse_label(label, where=where),
        where=where,
        is_path=True,
    )


def _table_rows(
    source: Path, text: str, *, delimiter: str, required: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place in the list, row with values stripped); blank lines are skipped."""
    lines = text.splitlines(keepends=True)
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        where = f"{source.name}:{reader.line_num}"
        if None in row or any(value is None for value in row.values()):
            raise ValueError(
                f"{where}: expected the {len(reader.fieldnames)} fields "
                f"{delimiter.join(reader.fieldnames)}; quote fields that contain {delimiter!r}"
            )
        if any(len(value.splitlines()) > 1 for value in row.values()):
            raise ValueError(f"{where}: a field has several lines; is a quote not closed?")
        stripped = {name: value.strip() for name, value in row.items()}
        for name in required:
            if not stripped.get(name):
                raise ValueError(f"{where}: field {name} is missing or empty")
        yield where, stripped
