"""Write docs/config.md: every key of a config, from the dataclasses and the comments beside them.

Run it from a checkout, `python docs/make_config_reference.py`, after changing a config's keys.
"""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from pathlib import Path
from typing import Any

from i3d_gn.detection.config import DetectionConfig
from i3d_gn.imagenet.config import ImagenetConfig
from i3d_gn.video.config import Config

PAGE = Path(__file__).with_name("config.md")

INTRODUCTION = """\
# Keys of a config

Made by `docs/make_config_reference.py` from the code; do not edit it by hand.

A config is one YAML file, complete in itself. A key that it omits has the default below; those
that are *required* have none. `key=value` on the command line overrides a value, for instance
`train.lr=0.02`, and `--print-config` of `i3d-gn train` prints the result. A misspelled key or a
value of the wrong type is an error that names the nearest valid key. Keys marked † belong to the
machine: they change no result, and may change when a run resumes.
"""


def comments(section: type) -> dict[str, str]:
    """The comment beside or above each field of a dataclass, those that it inherits included."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        by_line = {
            token.start[0]: token.string.removeprefix("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                beside = by_line.get(node.end_lineno or 0, "")
                above = by_line.get(node.lineno - 1, "")
                alone = source.splitlines()[node.lineno - 2].lstrip().startswith("#")
                own = beside or (above if alone else "")
                found[node.target.id] = own or found.get(node.target.id, "")  # of another default
    return found


def own_first(section: type) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass, those that it inherits last."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    names = (name for base in section.__mro__ for name in inspect.get_annotations(base))
    return [fields[name] for name in dict.fromkeys(names) if name in fields]


def annotations(section: type) -> dict[str, str]:
    """The type of each field, as written."""
    written: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if dataclasses.is_dataclass(base):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            written |= {
                node.target.id: ast.unparse(node.annotation)
                for node in definition.body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            }
    return written


def values(annotation: str) -> str:
    """A type for readers: the choices of a `Literal`, `list of ...` for a tuple."""
    optional = annotation.removesuffix(" | None")
    if optional.startswith("Literal["):
        choices = ast.literal_eval(f"({optional[len('Literal[') : -1]},)")
        return ", ".join(f"`{choice}`" for choice in choices)
    if optional.startswith("tuple["):
        return f"list of {optional[len('tuple[') :].partition(',')[0]}"
    return optional


def default(value: Any) -> str:
    """A default as one writes it in YAML."""
    if value == "???":
        return "*required*"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _yaml(match: re.Match[str]) -> str:
    return {"None": "null", "False": "false"}[match[0]]


def table(prefix: str, section: type) -> str:
    """The keys of a section as a Markdown table."""
    described, typed = comments(section), annotations(section)
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for field in own_first(section):
        if field.default is dataclasses.MISSING:
            continue  # a section
        mark = " †" if "machine" in field.metadata else ""
        cells = (
            f"`{prefix}{field.name}`{mark}",
            values(typed[field.name]),
            default(field.default),
            re.sub(r"\b(None|False)(?=:)", _yaml, described[field.name]),
        )
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |"))
    return "\n".join(lines)


def reference(title: str, schema: type) -> str:
    """The keys of a config, a table per section."""
    parts = [f"## {title}", table("", schema)]
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            assert isinstance(field.type, type)
            summary = inspect.getdoc(field.type)
            assert summary is not None
            parts += [f"### {field.name}", summary, table(f"{field.name}.", field.type)]
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            INTRODUCTION,
            reference("Video: `i3d-gn train` and `i3d-gn evaluate`", Config),
            "",
            reference("Images: `i3d-gn train-imagenet`", ImagenetConfig),
            "",
            reference("Detection: `i3d-gn train-coco`", DetectionConfig),
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
