"""Write an index as a list for other programs.

FORMAT is
  list      `path label` lines with ids, as for mmaction2, PySlowFast and video-nonlocal-net
  csv       path,label with a header and class names
  json      as for 3D-ResNets-PyTorch: labels, and database -> id -> subset, annotations.label;
            the subsets are training, validation and testing
  labels    class names, one per line in the order of the ids (a --label-map)
`i3d-gn index` reads all of these and assigns the same labels. Paths are relative to the index's
folder of videos, or absolute with --absolute. Videos without a label get id -1 in a list and an
entry without a label in a JSON; a CSV does not contain them.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath

from data_tools.command_line import new_parser, parse_options, run_script
from i3d_gn.files import check_output, write_json, write_text
from i3d_gn.video_io.index import VideoIndex

FORMATS = ("list", "csv", "json", "labels")
# The names of 3D-ResNets-PyTorch; other names are written unchanged.
_SUBSETS = {"train": "training", "val": "validation", "test": "testing"}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = new_parser("export", __doc__)
    parser.add_argument("index", type=Path, metavar="INDEX", help="the index, NAME.parquet")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the list")
    parser.add_argument("--format", choices=FORMATS, default="list", help="(default: %(default)s)")
    parser.add_argument("--absolute", action="store_true", help="write absolute paths")
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="subset of a JSON (default: %(default)s)"
    )
    return export_list(**parse_options(parser, argv))


def export_list(index: Path, output: Path, *, format: str, absolute: bool, split: str) -> int:
    """Write `output` and return the exit status.

    Raises:
        ValueError: For an index that cannot be read, or cannot be written in this format, and for
            an output that cannot be written.
    """
    videos = VideoIndex.load(index)
    check_output(output, [index])
    if videos.is_packed and format != "labels":
        raise ValueError(
            f"{index} lists packed videos, which have no paths; export the index that was packed"
        )
    names = videos.class_names
    labels = videos.labels.tolist()
    paths = [str(Path(videos.root, path)) if absolute else path for path in videos.paths]
    if format == "json":
        keys = [PurePosixPath(path).stem for path in paths]
        if len(set(keys)) != len(keys):
            raise ValueError(
                f"{index} has files of the same name in several folders, but entries of a JSON are "
                "keyed by name; choose another format"
            )
        subset = _SUBSETS.get(split, split)
        database = {
            key: {"subset": subset, "annotations": {"label": names[label]} if label >= 0 else {}}
            for key, label in zip(keys, labels, strict=True)
        }
        write_json(output, {"labels": list(names), "database": database})
        return 0
    text = io.StringIO()
    if format == "list":
        text.writelines(f"{path} {label}\n" for path, label in zip(paths, labels, strict=True))
    elif format == "labels":
        text.writelines(f"{name}\n" for name in names)
    else:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label"])
        writer.writerows(
            (path, names[label]) for path, label in zip(paths, labels, strict=True) if label >= 0
        )
    write_text(output, text.getvalue())
    return 0


if __name__ == "__main__":
    run_script(__file__)
