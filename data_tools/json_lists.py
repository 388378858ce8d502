"""Read lists of videos in JSON: 3D-ResNets-PyTorch, DeepMind's Kinetics, Something-Something v2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_tools.listed_videos import (
    Annotations,
    ListedVideo,
    segment_name,
    select_split,
    split_segment_name,
)


def read_json_list(source: Path, *, split: str | None) -> Annotations:
    """Read `source`, in the format that its structure shows.

    Raises:
        ValueError: For malformed entries, or a JSON of another structure.
    """
    try:
        document = json.loads(source.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not a JSON file: {error}") from error
    try:
        if isinstance(document, list):
            if split is not None:
                raise ValueError(f"{source} has no splits, so --split {split} does not apply")
            return _something_something(source, document)
        if "database" in document:
            return _resnets_3d(source, document, split=split)
        return _deepmind(source, document, split=split)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} has none of the supported JSON formats: 3D-ResNets-PyTorch (database -> id "
            "-> subset, annotations.label), DeepMind's Kinetics (id -> subset, annotations.label, "
            "annotations.segment) or Something-Something (list of id, template): "
            f"{type(error).__name__}: {error}"
        ) from error


def _resnets_3d(source: Path, document: dict[str, Any], *, split: str | None) -> Annotations:
    """`{"labels": [...], "database": {key: {"subset": ..., "annotations": {"label": ...}}}}`."""
    videos, splits = [], []
    for key, entry in document["database"].items():
        videos.append(
            ListedVideo(
                name=key,
                video_id=split_segment_name(key),
                label=_label(key, (entry.get("annotations") or {}).get("label")),
                where=f"{source.name}: {key}",
                is_path=False,
            )
        )
        splits.append(_text(key, "subset", entry["subset"]))
    further_names = tuple(document.get("labels", ()))
    if not all(isinstance(name, str) for name in further_names):
        raise TypeError(f"labels must be strings, not {further_names!r:.80}")
    return Annotations(
        kind="3D-ResNets JSON",
        videos=select_split(source, videos, splits, split=split),
        further_class_names=further_names,
    )


def _deepmind(source: Path, document: dict[str, Any], *, split: str | None) -> Annotations:
    """`{id: {"annotations": {"label": ..., "segment": [start, end]}, "subset": ...}}`."""
    videos, splits = [], []
    for video_id, entry in document.items():
        annotations = entry["annotations"]
        start, end = annotations["segment"]
        videos.append(
            ListedVideo(
                name=segment_name(video_id, round(start), round(end)),
                video_id=video_id,
                label=_label(video_id, annotations.get("label")),
                where=f"{source.name}: {video_id}",
                is_path=False,
            )
        )
        splits.append(_text(video_id, "subset", entry["subset"]))
    return Annotations(
        kind="Kinetics JSON of DeepMind",
        videos=select_split(source, videos, splits, split=split),
    )


def _something_something(source: Path, document: list[dict[str, Any]]) -> Annotations:
    """`[{"id": ..., "template": "Holding [something]", ...}]`; the test list has only ids.

    The class is the template without brackets, as in the official list of classes.
    """
    videos = []
    for i, entry in enumerate(document):
        video_id = str(entry["id"])
        template = entry.get("template")
        if template is not None:
            template = _text(video_id, "template", template).replace("[", "").replace("]", "")
        videos.append(
            ListedVideo(
                name=video_id,
                label=template,
                where=f"{source.name}: entry {i} ({video_id})",
                is_path=False,
            )
        )
    return Annotations(kind="Something-Something JSON", videos=videos)


def _label(key: str, label: Any) -> str | None:
    return None if label is None else _text(key, "label", label)


def _text(key: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{key} has the {field} {value!r}")
    return value
