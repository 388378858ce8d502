"""Write an index as one of the lists that other programs read.

FORMAT is
  list      `path label` lines with ids, of mmaction2, PySlowFast and video-nonlocal-net
  csv       path,label with a header and class names
  json      that of 3D-ResNets-PyTorch: labels, and database -> id -> subset, annotations.label,
            where the subsets are called training, validation and testing
  labels    class names, one a line in the order of the ids (a --label-map)
`index` reads all of them, and gives the videos the same labels again. Paths are relative to the
index's folder of videos, or absolute with --absolute. Videos without a label are -1, or left out of
what names labels.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath

from data_tools.command_line import new_parser, run_command, run_script
from data_tools.files import atomic_output, write_json
from i3d_gn.video_io.index import VideoIndex

FORMATS = ("list", "csv", "json", "labels")
# As 3D-ResNets-PyTorch asks for them; any other name is written as it is.
_SUBSETS = {"train": "training", "val": "validation", "test": "testing"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = new_parser("export_list", __doc__)
    parser.add_argument("index", type=Path, metavar="INDEX", help="the index, NAME.parquet")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the list")
    parser.add_argument("--format", choices=FORMATS, default="list", help="(default: %(default)s)")
    parser.add_argument("--absolute", action="store_true", help="write absolute paths")
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="subset in a json (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    return run_command("export_list", lambda: export_list(**vars(arguments)))


def export_list(index: Path, output: Path, *, format: str, absolute: bool, split: str) -> int:
    """Write ``output``; the exit status.

    Raises ``ValueError`` for an index that cannot be read, or that the format has no place for.
    """
    videos = VideoIndex.load(index)
    if videos.is_packed and format != "labels":
        raise ValueError(
            f"{index} is of packed videos, which have no paths; export the loose index"
        )
    names = videos.class_names
    labels = videos.labels.tolist()
    paths = [str(Path(videos.root, path)) if absolute else path for path in videos.paths]
    if format == "json":
        keys = [PurePosixPath(path).stem for path in paths]
        if len(set(keys)) != len(keys):
            raise ValueError(
                f"{index} has files of one name in several folders, which a json keyed by names "
                "cannot hold; choose another format"
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
    with atomic_output(output) as temporary:
        temporary.write_text(text.getvalue(), "utf-8")
    return 0


if __name__ == "__main__":
    run_script(__file__)
