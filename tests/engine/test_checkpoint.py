import copy
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from i3d_gn.engine.checkpoint import (
    BEFORE_VALIDATION,
    CheckpointError,
    delete_before_validation,
    is_before_validation,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model_state,
    load_newest,
    save_checkpoint,
    save_named,
)


def contents(**more):
    """What `load_checkpoint` demands of a checkpoint, and `more`."""
    return {
        "model": {}, "optimizer": {}, "config": {}, "trainer": {}, "num_broken": 0, **more
    }  # fmt: skip


def test_save_keeps_the_newest_and_leaves_no_temporary_file(tmp_path):
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step=step, contents=contents(x=step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000015.pt", "step_00000020.pt"]
    assert len(list(tmp_path.iterdir())) == 2
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert load_checkpoint(latest) == {"format": 1, "step": 20, **contents(x=20)}


def test_damaged_later_checkpoints_do_not_displace_good_ones(tmp_path):
    (tmp_path / "step_00000099.pt").write_bytes(b"damaged")
    for step in (5, 10):
        save_checkpoint(tmp_path, step=step, contents=contents(), keep=1)
    assert load_newest(tmp_path)[1]["step"] == 10


def test_failed_save_keeps_the_older_checkpoint(tmp_path):
    save_checkpoint(tmp_path, step=1, contents={}, keep=1)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(tmp_path, step=2, contents={"x": lambda: 0}, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001.pt"]


def test_invalid_files_are_one_line_errors(tmp_path):
    cut = save_checkpoint(tmp_path, step=1, contents=contents(x=torch.ones(10_000)), keep=1)
    cut.write_bytes(cut.read_bytes()[:20_000])
    text = tmp_path / "text.pt"
    text.write_text("hello")
    foreign = tmp_path / "foreign.pt"
    torch.save({"state_dict": {}}, foreign)
    empty = tmp_path / "empty.pt"
    empty.touch()
    for path, message in [
        (cut, "cannot be read as a checkpoint"),
        (text, "cannot be read as a checkpoint .*not a zip file"),
        (empty, "cannot be read as a checkpoint"),
        (foreign, "not a checkpoint of i3d_gn .* starting weights"),
        (tmp_path / "none.pt", "checkpoint not found"),
        (tmp_path, "is a folder, .* newest checkpoint in it is .*step_00000001.pt"),
    ]:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_pickle_that_runs_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    torch.save({"format": 1, "x": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "harmful.pt")
    assert not (tmp_path / "was_run").exists()


def test_state_of_another_model_changes_nothing():
    model = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for state, message in [
        ({"weight": torch.ones(2, 3)}, "bias is missing"),
        ({"weight": torch.ones(5, 3), "bias": torch.ones(2)}, r"weight is \(5, 3\), the model's"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "x": 0}, "x is unknown"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_model_state(model, state, path="some.pt")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_every_flipped_byte_of_a_tensor_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, step=1, contents=contents(x=torch.ones(1000)), keep=1)
    whole = path.read_bytes()
    start = whole.index(torch.ones(1000).numpy().tobytes())
    for offset in (0, 1, 1999, 3999):
        flipped = bytearray(whole)
        flipped[start + offset] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"damaged: the checksum of .*data/0 is wrong"):
            load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "its step is -1"),
        ({"step": "1"}, "its step is '1'"),
        ({"step": 1.0}, "its step is 1.0"),
        ({"step": 2}, "renamed: by its contents it is of step 2"),
        ({"optimizer": None}, "'optimizer' is missing or of a wrong type"),
        ({"num_broken": "many"}, "'num_broken' is missing or of a wrong type"),
    ],
)
def test_contents_that_no_run_saves_are_refused(tmp_path, change, message):
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 1, "step": 1, **contents(), **change}, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="unpack to 10000000, which is refused"):
        load_checkpoint(path)


def test_members_that_share_their_bytes_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, step=1, contents=contents(x=torch.ones(10_000)), keep=1)
    with zipfile.ZipFile(path) as archive:
        (shared,) = [m for m in archive.infolist() if m.file_size == 40_000]
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(5):
            again = copy.copy(shared)
            again.filename = f"archive/data/{number + 1}"
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(CheckpointError, match=r"bytes unpack to 2\d{5}, which is refused"):
        load_checkpoint(path)


def test_damaged_newest_checkpoint_falls_back_to_an_older_one(tmp_path, caplog):
    assert load_newest(tmp_path) is None
    old, new = (
        save_checkpoint(tmp_path, step=step, contents=contents(x=step), keep=2) for step in (1, 2)
    )
    assert load_newest(tmp_path)[0] == new
    new.write_bytes(new.read_bytes()[:-100])
    path, loaded = load_newest(tmp_path)
    assert (path, loaded["x"]) == (old, 1)
    assert "step_00000002.pt: cannot be read" in caplog.text
    assert "resuming from an older checkpoint" in caplog.text
    old.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* is intact"):
        load_newest(tmp_path)


def test_checkpoint_before_validation_counts_only_if_it_is_the_newest(tmp_path):
    save_checkpoint(tmp_path, step=1, contents=contents(), keep=2)
    pending = save_named(tmp_path, BEFORE_VALIDATION, step=2, contents=contents())
    assert is_before_validation(load_newest(tmp_path)[0])
    newest = save_checkpoint(tmp_path, step=2, contents=contents(), keep=2)
    assert load_newest(tmp_path)[0] == newest
    newest.unlink()
    pending.write_bytes(b"damaged")
    assert load_newest(tmp_path)[1]["step"] == 1
    delete_before_validation(tmp_path)
    assert not pending.exists()


def test_full_disk_is_an_os_error_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(_contents, file):
        file.write(b"x" * 1000)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint .*step_00000001.pt cannot be written"):
        save_checkpoint(tmp_path, step=1, contents=contents(), keep=1)
    assert list(tmp_path.iterdir()) == []


FILLS_UP = """
import resource, sys
from pathlib import Path
import torch
from i3d_gn.engine.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint(Path(sys.argv[1]), step=1, contents={"x": torch.zeros(100_000)}, keep=1)
except OSError as error:
    print(error)
"""


def test_the_reason_of_the_system_is_given_not_that_of_torch(tmp_path):
    """torch's own is `unexpected pos 704 vs 598`."""
    command = [sys.executable, "-c", FILLS_UP, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot be written (File too large)" in output
    assert list(tmp_path.iterdir()) == []
