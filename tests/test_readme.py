import re
import subprocess
from pathlib import Path

import pytest

from i3d_gn import cli
from i3d_gn.video.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()


def tree():
    """(path, phrase) of each line of the README's tree."""
    (block,) = re.findall(r"## Files\n\n```\n(.*?)```", README, flags=re.S)
    folders, entries = [], []
    for line in block.splitlines():
        match = re.fullmatch(r"( *)(\S+)(?: +(.+))?", line)
        assert match, line
        depth = len(match[1]) // 2
        folders[depth:] = [match[2].rstrip("/")]
        entries.append(("/".join(folders), match[3]))
    return entries


def test_the_tree_is_true():
    missing = [path for path, _ in tree() if not (REPOSITORY / path).exists()]
    assert not missing


def test_every_file_has_one_phrase():
    listed = {path for path, phrase in tree() if phrase}
    output = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if output.returncode:
        pytest.skip("not a git checkout")
    expected = {
        name
        for name in output.stdout.splitlines()
        if re.match(r"(i3d_gn|data_tools|benchmarks|docs|configs)/", name)
        and name.endswith((".py", ".md", ".yaml", ".sh"))
        and not name.endswith(("__init__.py", "README.md"))
        and not re.match(r"configs/\w+/|docs/results/|benchmarks/results/", name)
    }
    assert expected <= listed, sorted(expected - listed)


def test_every_command_line_in_the_docs_is_one():
    commands = set(cli.COMMANDS)
    for page in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]:
        for command in re.findall(r"^ *i3d-gn (\S+)", page.read_text(), flags=re.M):
            assert command in commands, f"{page.name}: i3d-gn {command}"


def test_configs_named_in_the_readme_load():
    names = set(re.findall(r"configs/[\w/]+\.yaml", README))
    assert names
    for name in names:
        load_config(REPOSITORY / name)
