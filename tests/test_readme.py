import re
from pathlib import Path

import pytest

from i3d_gn import cli
from i3d_gn.video.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
PAGES = [
    REPOSITORY / "README.md",
    *REPOSITORY.glob("docs/**/*.md"),
    *REPOSITORY.glob("benchmarks/**/*.md"),
    *REPOSITORY.glob("configs/**/*.yaml"),
]
ROOMS = sorted(path.parent for path in REPOSITORY.glob("i3d_gn/*/__init__.py"))


def tree():
    """(path, phrase) of each line of the README's tree."""
    (block,) = re.findall(r"## Where to find what\n\n```\n(.*?)```", README, flags=re.S)
    folders, entries = [], []
    for line in block.splitlines():
        match = re.fullmatch(r"( *)(\S+)(?: +(.+))?", line)
        assert match, line
        depth = len(match[1]) // 2
        folders[depth:] = [match[2].rstrip("/")]
        entries.append(("/".join(folders), match[3]))
    return entries


def test_tree_exists():
    missing = [path for path, _ in tree() if not (REPOSITORY / path).exists()]
    assert not missing


def test_tree_lists_every_room_with_a_phrase():
    listed = {path for path, phrase in tree() if phrase}
    assert ROOMS
    for room in ROOMS:
        assert room.relative_to(REPOSITORY).as_posix() in listed


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_init_of_a_room_says_what_it_is_for(room):
    first_line = (room / "__init__.py").read_text().splitlines()[0]
    assert re.fullmatch(r'"""[A-Z].{10,}\."*', first_line)


def test_commands_in_the_docs_exist():
    found = 0
    for page in PAGES:
        text = page.read_text()
        commands = re.findall(r"(?:^|`)[ #]*i3d-gn ([\w-]+)", text, flags=re.M)
        commands += re.findall(r"-m i3d_gn (\S+)", text)
        for command in commands:
            assert command in {*cli.COMMANDS, "COMMAND", "-h"}, f"{page.name}: i3d-gn {command}"
        assert "-m i3d_gn." not in text, page.name
        found += len(commands)
    assert found > 20


def test_configs_named_in_the_readme_load():
    names = set(re.findall(r"configs/[\w/]+\.yaml", README))
    assert names
    for name in names:
        load_config(REPOSITORY / name)
