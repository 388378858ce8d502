"""docs/config.md lists every key of every config, as the code has it."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from i3d_gn.detection.config import DetectionConfig
from i3d_gn.imagenet.config import ImagenetConfig
from i3d_gn.video.config import Config

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reference():
    path = REPOSITORY / "docs" / "make_config_reference.py"
    spec = importlib.util.spec_from_file_location("make_config_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_page_is_up_to_date(reference):
    remedy = "run `python docs/make_config_reference.py` and commit docs/config.md"
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), remedy


@pytest.mark.parametrize("schema", [Config, ImagenetConfig, DetectionConfig])
def test_every_key_is_listed_with_default_and_description(reference, schema):
    page = reference.page()
    sections = {"": schema} | {
        f"{field.name}.": field.type
        for field in dataclasses.fields(schema)
        if dataclasses.is_dataclass(field.type)
    }
    for prefix, section in sections.items():
        for field in dataclasses.fields(section):
            if not dataclasses.is_dataclass(field.type):
                rows = [
                    line.strip("| ").split(" | ")
                    for line in page.splitlines()
                    if line.startswith(f"| `{prefix}{field.name}`")
                ]
                assert rows, f"{prefix}{field.name} is not listed"
                assert all(len(row) == 4 for row in rows), f"{prefix}{field.name} needs a comment"
                assert reference.default(field.default) in [row[2] for row in rows]


def test_inherited_keys_choices_and_marks(reference):
    page = reference.page()
    assert "| `train.schedule` | `step`, `cosine` | step |" in page
    assert "| `data.root` † | str | null | folder of the videos; null: as" in page
    assert "| `train.milestones` | list of int | [] | steps after which" in page
    assert "| `output_dir` † | str | *required* |" in page
