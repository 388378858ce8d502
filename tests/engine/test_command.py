"""What commands print: control characters in file names never reach the terminal."""

import logging

import pytest

from data_tools.printing import print_first
from i3d_gn.engine.command import NonFiniteLossError, Stopped, run_command, start_logging
from i3d_gn.engine.markdown import markdown_table

NAME = "clip\x1b]0;title\x07\n.mp4"
SHOWN = r"clip\x1b]0;title\x07\n.mp4"


def test_logs_escape_file_names(monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's, with which no other is installed
    monkeypatch.setattr(root, "level", root.level)
    start_logging()
    logging.getLogger("i3d_gn.engine.loop").warning("skipped in step %d: %s", 3, NAME)
    try:
        raise OSError("with a traceback")
    except OSError:
        logging.getLogger("i3d_gn").exception(f"of {NAME}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        f"skipped in step 3: {SHOWN}",
        f"of {SHOWN}",
        "Traceback (most recent call last):",
    ]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, 2), (OSError, 2), (NonFiniteLossError, 1), (Stopped, 75)]
)
def test_errors_escape_file_names(error, status, capsys):
    def command():
        raise error(f"about {NAME}")

    assert run_command(command) == status
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert f"about {SHOWN}" in output


def test_findings_and_tables_escape_file_names(capsys):
    print_first([NAME])
    assert capsys.readouterr().out == f"    {SHOWN}\n"
    assert markdown_table([["run"], [NAME]]).splitlines()[2] == f"| {SHOWN} |"
