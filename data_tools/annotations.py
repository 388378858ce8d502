"""Read lists of videos and labels in the common formats.

    source                                video named by           label
    official Kinetics CSV                 youtube_id and segment   name, none in the test list
    JSON of 3D-ResNets-PyTorch            key in `database`        name
    JSON of DeepMind's Kinetics           id and segment           name
    JSON of Something-Something           id                       template without brackets
    folder of HMDB51's split files        file name                name of the file
    table with a header                   path                     name or id
    `path label` list                     path                     name or id
    folder of class folders               path in the folder       name of the class folder

Whether the listed files exist is not checked here.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from data_tools.hmdb51_splits import is_split_file, read_hmdb51_splits
from data_tools.json_lists import read_json_list
from data_tools.listed_videos import Annotations, ListedVideo
from data_tools.text_lists import read_text_list
from i3d_gn.video_io.find_videos import find_files

_IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})
# How to make a video of a folder of frames.
FRAMES_REMEDY = (
    "folders of frames are not supported; make a video of each, for instance with "
    "`ffmpeg -framerate 25 -i FOLDER/%05d.jpg -crf 18 VIDEO.mp4`"
)


def read_annotations(source: Path, *, split: str | None = None) -> Annotations:
    """Read `source`; its format is detected from its contents.

    Args:
        source: A list, a folder of class folders, or a folder of HMDB51's split files.
        split: The split to select from a source that has several (train, val, test, or as spelled
            in the source).

    Raises:
        ValueError: For malformed entries, naming the line, and for a source without videos.
    """
    if source.is_dir():
        if any(map(is_split_file, source.iterdir())):
            return read_hmdb51_splits(source, split=split)
        if split is not None:
            raise ValueError(
                f"{source} is a folder of class folders, which has no named splits: pass the "
                f"folder of {split} as SOURCE, or a fraction for training, such as --split 0.8"
            )
        return _read_class_folders(source)
    if not source.is_file():
        raise ValueError(f"list or folder not found: {source}")
    if is_split_file(source):
        raise ValueError(f"{source} is one class of HMDB51; pass the folder of all as SOURCE")
    read = read_json_list if source.suffix.lower() == ".json" else read_text_list
    annotations = read(source, split=split)
    if not annotations.videos:
        raise ValueError(f"{source} ({annotations.kind}) lists no videos")
    return annotations


def _read_class_folders(root: Path) -> Annotations:
    """`root/<class>/.../<video>`.

    A folder without videos is a class too: ids must not depend on which videos are missing.
    """
    classes = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    files = find_files(root)
    videos = [
        ListedVideo(
            name=path, label=path.partition("/")[0], where=f"folder {root.name}", is_path=True
        )
        for path in files.videos
        if "/" in path
    ]
    if not videos:
        suffixes = {PurePosixPath(path).suffix.lower() for path in files.others}
        raise ValueError(
            f"{root} has no class folders with videos; {FRAMES_REMEDY}"
            if suffixes & _IMAGE_EXTENSIONS
            else f"{root} has no class folders with videos (expected <class>/<video>.mp4); for a "
            "flat folder, pass its list as SOURCE and the folder as --videos"
        )
    flat = [path for path in files.videos if "/" not in path]
    return Annotations(
        kind="class folders",
        videos=videos,
        further_class_names=tuple(classes),
        skipped=(*flat, *files.others),
    )
