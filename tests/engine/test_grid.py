import json
import os
import signal
import subprocess
import sys
import time

import pytest

from i3d_gn.engine import grid
from i3d_gn.engine.grid import read_grid, run_grid
from i3d_gn.engine.run_dir import DirLock
from i3d_gn.engine.typed_config import ConfigError

GRID = """
config: base.yaml
commands: [train, evaluate]
output_dir: {folder}
axes:
  cell:
    gn: {{model.norm: gn, train.milestones: [1, 2]}}
    bn: {{model.norm: bn, train.lr: 1e-4, model.inflate: true}}
  seed:
    0: {{seed: 0}}
    1: {{seed: 1}}
"""

# Stands in for `python -m i3d_gn`: appends its arguments to `calls` and does as environment says.
PROGRAM = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[-1].partition("=")[2])
with open(folder / "calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if os.environ.get("FAIL") in sys.argv:
    sys.exit("out of luck")
if sys.argv[1] == "wait":
    def stop(*_):
        (folder / "stopped").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    pathlib.Path(folder, "ready").touch()
    time.sleep(60)
print(os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"))
"""


@pytest.fixture
def grid_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("train: {lr: 0.1}")
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.format(folder=tmp_path / "runs"))
    return path


@pytest.fixture
def program(tmp_path, monkeypatch):
    package = tmp_path / "code" / "i3d_gn"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return tmp_path


def calls(run):
    return (run.folder / "calls").read_text().splitlines()


def test_first_axis_varies_fastest_and_overrides_are_merged(grid_file, tmp_path):
    runs = read_grid(grid_file, ["data.root=/videos"])
    assert [run.folder.name for run in runs] == ["gn-0", "bn-0", "gn-1", "bn-1"]
    assert runs[3].folder == tmp_path / "runs" / "bn-1"
    shared = ("base.yaml", "model.norm=bn", "train.lr=0.0001", "model.inflate=true", "seed=1",
              "data.root=/videos", f"output_dir={tmp_path / 'runs' / 'bn-1'}")  # fmt: skip
    assert runs[3].commands == (("train", *shared), ("evaluate", *shared))
    assert "train.milestones=[1, 2]" in runs[0].commands[0]


def test_output_dir_moves_the_grid(grid_file, tmp_path):
    runs = read_grid(grid_file, ["seed=1", f"output_dir={tmp_path}/other"])
    assert [run.folder for run in runs][:2] == [tmp_path / "other" / f"{n}-0" for n in ("gn", "bn")]
    assert runs[0].commands[0][-2:] == ("seed=1", f"output_dir={tmp_path}/other/gn-0")


def test_each_command_runs_once(grid_file, program, capfd):
    runs = read_grid(grid_file)
    assert run_grid(runs, jobs=2) == []
    assert [[line.split()[0] for line in calls(run)] for run in runs] == [["train", "evaluate"]] * 4
    assert run_grid(read_grid(grid_file), jobs=1) == []
    assert all(len(calls(run)) == 2 for run in runs)
    assert "4 runs, 4 of them done" in capfd.readouterr().out
    changed = read_grid(grid_file, ["train.lr=0.2"])  # other arguments: not the same runs
    assert run_grid(changed, jobs=2) == []
    assert all(len(calls(run)) == 4 for run in runs)
    (program / "base.yaml").write_text("train: {lr: 0.3}")  # nor of another config
    assert run_grid(read_grid(grid_file, ["train.lr=0.2"]), jobs=2) == []
    assert all(len(calls(run)) == 6 for run in runs)


def test_failed_command_is_repeated_and_others_go_on(grid_file, program, monkeypatch, capfd):
    runs = read_grid(grid_file)
    monkeypatch.setenv("FAIL", "evaluate")
    assert {run.folder for run in run_grid(runs, jobs=2)} == {run.folder for run in runs}
    assert "out of luck" in (runs[0].folder / "grid.log").read_text()
    assert "failed, see" in capfd.readouterr().out
    monkeypatch.delenv("FAIL")
    assert run_grid(runs, jobs=2) == []
    for run in runs:
        assert [line.split()[0] for line in calls(run)] == ["train", "evaluate", "evaluate"]


@pytest.mark.parametrize(("given", "threads"), [(None, "8"), ("3", "3")])
def test_cores_and_devices_are_shared_out(grid_file, program, monkeypatch, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    runs = read_grid(grid_file)
    run_grid(runs, jobs=2, devices=["3", "5"])
    seen = {line for run in runs for line in (run.folder / "grid.log").read_text().splitlines()}
    assert seen == {f"{threads} 3", f"{threads} 5"}
    with pytest.raises(ConfigError, match="number of --devices"):
        grid.main([str(grid_file), "--jobs", "3", "--devices", "0,1"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_grid_stops_its_runs(grid_file, program, number):
    grid_file.write_text(grid_file.read_text().replace("[train, evaluate]", "[wait]"))
    code = (
        "import sys, i3d_gn.cli; i3d_gn.__path__  # this package, not the stand-in\n"
        "sys.exit(i3d_gn.cli.main(['grid', sys.argv[1], '--jobs', '2']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"]}
    source = os.path.dirname(os.path.dirname(os.path.dirname(grid.__file__)))
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}", grid_file],
        env=environment,
    )
    folders = [run.folder for run in read_grid(grid_file)[:2]]
    while not all((folder / "ready").exists() for folder in folders):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) in {75, 130, -signal.SIGKILL}
    deadline = time.monotonic() + (30 if number == signal.SIGKILL else 0)
    while not all((folder / "stopped").exists() for folder in folders):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not any((folder / "grid.json").exists() for folder in folders)


def test_two_processes_cannot_run_one_grid(grid_file, program):
    runs = read_grid(grid_file)
    lock = DirLock(runs[0].folder.parent)
    with pytest.raises(ConfigError, match="in use by another process"):
        run_grid(runs, jobs=1)
    lock.close()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("config: base.yaml", "", "must have the keys axes, commands, config, output_dir"),
        ("[train, evaluate]", "train", "commands is 'train'; expected a list"),
        ("{model.norm: gn, train.milestones: [1, 2]}", "gn", "axes.cell is"),
        ("axes:", "axes: {\n", "cannot be read"),
        ("    bn:", "    gn:", "cannot be read: .*found duplicate key gn"),
        ("    1: {", "    0/: {", "two runs have the folder .*runs/gn-0; change their names"),
        ("  seed:\n    0: {seed: 0}\n    1: {seed: 1}", "  seed: {}", "axes.seed is {}; expected"),
        ("base.yaml", "other.yaml", "config file not found: other.yaml"),
    ],
)
def test_malformed_grid_is_one_line(grid_file, old, new, message):
    grid_file.write_text(grid_file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        read_grid(grid_file)
    assert "\n" not in str(error.value)


def test_damaged_record_repeats_the_commands(grid_file, program):
    runs = read_grid(grid_file)
    run_grid(runs, jobs=2)
    (runs[0].folder / "grid.json").write_text("[1")
    assert [run.num_done() for run in runs] == [0, 2, 2, 2]
    for content in ({"a": 1}, [["train"]]):
        (runs[0].folder / "grid.json").write_text(json.dumps(content))
        assert runs[0].num_done() == 0
