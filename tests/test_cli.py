import subprocess
import sys

import pytest

import i3d_gn
from i3d_gn import cli
from i3d_gn.engine.command import run_command
from i3d_gn.engine.typed_config import to_yaml
from i3d_gn.video.config import load_config
from i3d_gn.video.train import train


def test_train_evaluate_report(small_run, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small_run("train.steps=2")))
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["evaluate", str(path)]) == 0
    assert "6 videos, 3 clips each: top-1" in capsys.readouterr().out
    figure = tmp_path / "curves.png"
    outputs = ["--out", str(figure), "--html", str(tmp_path / "report.html")]
    assert cli.main(["report", str(tmp_path / "run"), *outputs]) == 0
    output = capsys.readouterr().out
    assert "| run " in output
    assert "(3 clips)" in output
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_print_config_runs_nothing(small_run, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small_run()))
    assert cli.main(["train", str(path), "--print-config", "train.lr=0.5"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed).train.lr == 0.5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "nowhere.yaml"], "error: config file not found: nowhere.yaml"),
        (["report", "nowhere"], "error: nowhere has no config.yaml"),
    ],
)
def test_user_error_is_one_line_and_exit_status_2(arguments, line, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_os_error_is_one_line_and_exit_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    def writes_below_a_file():
        (tmp_path / "file" / "run").mkdir()
        return 0

    assert run_command(writes_below_a_file) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path / "file" / "run") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["-videos", "--0abcABC123"])
def test_names_that_begin_with_a_hyphen(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name / "a class").mkdir(parents=True)
    assert cli.main(["resize", name, "small"]) == 2
    assert f"no videos found below {tmp_path / name}" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in output


def test_every_command_has_help(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert "usage: " in capsys.readouterr().out


def test_unknown_command_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fly"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'fly'" in error
    assert "'download'" in error


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"i3d-gn {i3d_gn.__version__}\n"


@pytest.mark.parametrize("arguments", [[], *([command] for command in cli.COMMANDS)])
def test_help_does_not_import_torch(arguments):
    program = (
        "import sys\n"
        "from i3d_gn.cli import main\n"
        "try:\n"
        "    main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)


def test_report_does_not_import_torch(small_run, one_process, tmp_path):
    train(small_run("train.steps=2"), one_process)
    program = (
        "import sys\n"
        "from i3d_gn.cli import main\n"
        "assert main(['report', *sys.argv[1:]]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    outputs = ["--out", str(tmp_path / "curves.png"), "--html", str(tmp_path / "report.html")]
    arguments = [str(tmp_path / "run"), *outputs]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
