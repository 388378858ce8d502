"""The wheel: what is in it, and its commands in a folder without a checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from i3d_gn.engine.config_files import config_files
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.video.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("i3d_gn", "data_tools", "configs"):  # building writes beside the sources
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    program = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_has_every_file_of_the_packages_and_every_config(wheel):
    files = {
        path.relative_to(REPOSITORY).as_posix()
        for name in ("i3d_gn", "data_tools")
        for path in (REPOSITORY / name).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    configs = {
        f"i3d_gn/configs/{path.relative_to(REPOSITORY / 'configs').as_posix()}"
        for path in (REPOSITORY / "configs").rglob("*.yaml")
    }
    assert len(configs) > 15
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files | configs


@pytest.mark.slow
def test_commands_of_the_wheel_find_configs_by_name_from_any_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    name = "kinetics400/gn_32x2_8clips"
    program = (
        "import sys; sys.path.insert(0, '../installed')\n"
        "import i3d_gn.cli\n"
        "assert 'installed' in i3d_gn.__file__\n"
        f"sys.exit(i3d_gn.cli.main(['train', '{name}', '--print-config']))\n"
    )
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", program] if sys.version_info >= (3, 11)
        else [sys.executable, "-c", program],
        cwd=tmp_path / "elsewhere", check=True, capture_output=True, text=True,
    )  # fmt: skip
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout)
    assert load_config(printed) == load_config(REPOSITORY / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("name", ["demo", "demo.yaml", Path("kinetics400/bn_64x1_4clips")])
def test_config_is_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = REPOSITORY / "configs" / str(name).removesuffix(".yaml")
    assert load_config(name) == load_config(path.with_suffix(".yaml"))


def test_file_wins_over_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "configs" / "demo.yaml").read_text()
    Path("demo").write_text(text.replace("seed: 0", "seed: 17"))
    assert load_config("demo").seed == 17


@pytest.mark.parametrize("name", ["demos", "kinetics400", "../configs/demo", "configs/demo.yaml"])
def test_unknown_name_lists_those_there_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        load_config(name)
    message = str(raised.value)
    assert message.startswith(f"config file not found: {name}; configs known by name are ")
    assert all(known in message for known in config_files())
    assert "kinetics400/gn_64x1_4clips" in message
