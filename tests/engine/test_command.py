"""What commands print: control characters in file names never reach the terminal."""

import logging
import os
import signal

import pytest
import torch

from data_tools.printing import print_first
from i3d_gn.engine.checkpoint import load_checkpoint
from i3d_gn.engine.command import NonFiniteLossError, run_command, start_logging
from i3d_gn.engine.markdown import markdown_table
from i3d_gn.engine.stop_signals import Stopped
from i3d_gn.files import atomic_output

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


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGTERM, 75, "stopped by SIGTERM"),
        (signal.SIGHUP, 75, "stopped by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_signal_stops_a_command_and_removes_its_unfinished_file(
    number, status, line, tmp_path, capsys
):
    before = signal.signal(number, signal.default_int_handler)  # nohup ignores SIGHUP

    def command():
        with atomic_output(tmp_path / "out.npy") as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), number)
            pytest.fail("the signal stops the command at once")

    try:
        assert run_command(command) == status
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == f"{line}; run the same command again\n"
    assert not list(tmp_path.iterdir())


def test_code_that_handles_errors_of_damaged_files_does_not_handle_signals(
    tmp_path, monkeypatch, capsys
):
    """It would resume from an older checkpoint, or call a good file damaged."""
    path = tmp_path / "step_00000020.pt"
    torch.save({"weight": torch.zeros(2)}, path)

    def stopped(_archive):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal stops the command at once")

    monkeypatch.setattr("zipfile.ZipFile.testzip", stopped)
    assert run_command(lambda: 0 if load_checkpoint(path) else 1) == 75
    assert capsys.readouterr().err == "stopped by SIGTERM; run the same command again\n"


@pytest.mark.parametrize(("world_size", "ends_at_once"), [("1", False), ("2", True)])
def test_rank_that_waits_for_others_ends_at_once(world_size, ends_at_once, monkeypatch):
    """A handler in Python would run when the wait is over."""
    monkeypatch.setenv("WORLD_SIZE", world_size)
    handlers = []
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert run_command(lambda: handlers.append(signal.getsignal(signal.SIGTERM)) or 0) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (handlers == [signal.SIG_DFL]) == ends_at_once
