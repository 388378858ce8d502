import pickle

import pytest
import torch
from torch import nn

from i3d_gn.engine.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model_state,
    save_checkpoint,
)


def test_save_keeps_the_newest_and_leaves_no_temporary_file(tmp_path):
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step=step, contents={"x": step}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000015.pt", "step_00000020.pt"]
    assert len(list(tmp_path.iterdir())) == 2
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert load_checkpoint(latest) == {"format": 1, "step": 20, "x": 20}


def test_failed_save_keeps_the_older_checkpoint(tmp_path):
    save_checkpoint(tmp_path, step=1, contents={}, keep=1)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(tmp_path, step=2, contents={"x": lambda: 0}, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001.pt"]


def test_invalid_files_are_one_line_errors(tmp_path):
    cut = save_checkpoint(tmp_path, step=1, contents={"x": torch.ones(10_000)}, keep=1)
    cut.write_bytes(cut.read_bytes()[:20_000])
    text = tmp_path / "text.pt"
    text.write_text("hello")
    foreign = tmp_path / "foreign.pt"
    torch.save({"state_dict": {}}, foreign)
    empty = tmp_path / "empty.pt"
    empty.touch()
    for path, message in [
        (cut, "cannot be read as a checkpoint"),
        (text, "cannot be read as a checkpoint"),
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
