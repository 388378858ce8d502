"""JSON lists, with entries as they occur in practice."""

import json

import pytest

from data_tools.annotations import read_annotations
from tests.data_tools.conftest import named


def test_json_of_3d_resnets(write):
    database = {
        "0wR5jVB-WPk_000417_000427": {"subset": "validation", "annotations": {"label": "yoga"}},
        "_abc": {"subset": "training", "annotations": {"label": "abseiling"}},
        "-xy": {"subset": "testing", "annotations": {}},
    }
    path = write(json.dumps({"labels": ["yoga", "abseiling"], "database": database}), "k.json")
    annotations = read_annotations(path, split="val")
    assert annotations.kind == "3D-ResNets JSON"
    assert named(annotations) == [("0wR5jVB-WPk_000417_000427", "yoga")]
    assert (annotations.videos[0].video_id, annotations.videos[0].is_path) == ("0wR5jVB-WPk", False)
    assert annotations.further_class_names == ("yoga", "abseiling")
    for split in ("training", "train"):
        assert named(read_annotations(path, split=split)) == [("_abc", "abseiling")]
    assert named(read_annotations(path, split="test")) == [("-xy", None)]


def test_json_of_something_something(write):
    entries = [
        {
            "id": "78687",
            "label": "holding a potato",
            "template": "Holding [something]",
            "placeholders": ["a potato"],
        },
        {"id": 42, "label": "x", "template": "Putting [something] on [something]"},
        {"id": "1420"},
    ]
    annotations = read_annotations(write(json.dumps(entries), "train.json"))
    assert annotations.kind == "Something-Something JSON"
    assert named(annotations) == [
        ("78687", "Holding something"),
        ("42", "Putting something on something"),
        ("1420", None),
    ]
    assert not any(video.is_path for video in annotations.videos)
    with pytest.raises(ValueError, match="has no splits"):
        read_annotations(write(json.dumps(entries), "train.json"), split="train")


def test_json_of_deepmind(write):
    def entry(subset, **annotations):
        return {"annotations": annotations, "duration": 10.0, "subset": subset, "url": "x"}

    document = {
        "0wR5jVB-WPk": entry("train", label="abseiling", segment=[417.0, 427.0]),
        "_b": entry("validate", label="yoga", segment=[1.0, 11.0]),
        "-c": entry("test", segment=[2.0, 12.0]),
    }
    path = write(json.dumps(document), "kinetics700.json")
    (train,) = read_annotations(path, split="train").videos
    assert (train.name, train.label) == ("0wR5jVB-WPk_000417_000427", "abseiling")
    assert (train.video_id, train.is_path) == ("0wR5jVB-WPk", False)
    assert named(read_annotations(path, split="val")) == [("_b_000001_000011", "yoga")]
    assert named(read_annotations(path, split="test")) == [("-c_000002_000012", None)]
    with pytest.raises(ValueError, match="has the splits test, train, validate; select one"):
        read_annotations(path)
