import pytest

from i3d_gn import cli
from i3d_gn.engine.command import run_command
from i3d_gn.engine.typed_config import to_yaml
from i3d_gn.video.config import load_config


def test_the_jobs_run_as_subcommands_and_end_in_a_report(small_run, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small_run("train.steps=2")))
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["evaluate", str(path), "test.num_clips=2"]) == 0
    assert "6 videos, 2 clips each: top-1" in capsys.readouterr().out
    figure = tmp_path / "curves.png"
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(figure)]) == 0
    output = capsys.readouterr().out
    assert "| run " in output
    assert "(2 clips)" in output
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_print_config_prints_what_would_run_and_runs_nothing(small_run, tmp_path, capsys):
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
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such config file"),
        (["report", "nowhere"], "error: nowhere: no config.yaml in it"),
        (["fly"], "i3d-gn: unknown command 'fly'; one of download, extract"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, line, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_a_full_or_unwritable_disk_is_one_line_and_exit_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")

    def writes_below_a_file():
        (tmp_path / "file" / "run").mkdir()
        return 0

    assert run_command(writes_below_a_file) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path / "file" / "run") in error
    assert error.count("\n") == 1


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    output = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in output


def test_every_command_has_help(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert "usage: " in capsys.readouterr().out
