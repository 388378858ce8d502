"""State dicts inside other dictionaries and modules, averages, and tensors that are not weights."""

import argparse
import collections

import numpy as np
import pytest
import torch

from i3d_gn import cli
from i3d_gn.weights.read import read_weights

# Names of torchvision, of which reading checks no shape.
STATE = {
    "conv1.weight": torch.arange(3.0).view(1, 3, 1, 1),
    "layer1.0.conv1.weight": torch.full((1, 1, 1, 1), 2.0),
    "layer1.0.conv3.weight": torch.ones(1, 1, 1, 1),
    "layer1.0.bn3.running_mean": torch.tensor([0.5]),
    "fc.weight": torch.full((2, 1), 3.0),
}
OWN = {
    "conv1.weight": STATE["conv1.weight"],
    "res2.0.conv1.weight": STATE["layer1.0.conv1.weight"],
    "res2.0.conv3.weight": STATE["layer1.0.conv3.weight"],
    "res2.0.norm3.running_mean": STATE["layer1.0.bn3.running_mean"],
    "head.linear.weight": STATE["fc.weight"],
}
ZEROS = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}


def prefixed(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def nested(keys):
    content = STATE
    for key in reversed(keys):
        content = {key: content}
    return content


def equals(tensors, expected=OWN):
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    ("content", "entry", "unused"),
    [
        (STATE, "", ()),
        (collections.OrderedDict(STATE), "", ()),
        (prefixed("module."), "module", ()),
        (prefixed("_orig_mod."), "_orig_mod", ()),
        (prefixed("module._orig_mod."), "module._orig_mod", ()),
        (prefixed("_orig_mod.module.model.encoder."), "_orig_mod.module.model.encoder", ()),
        (prefixed("visual."), "visual", ()),
        ({"epoch": 3, "state_dict": prefixed("module."), "best": torch.tensor(1.0)},
         "state_dict.module", ()),
        ({"state_dict": prefixed("model."), "hyper_parameters": {"lr": 0.1}},
         "state_dict.model", ()),
        ({"state_dict": {**prefixed("backbone."), "loss.weight": torch.ones(9)}},
         "state_dict.backbone", ("loss.weight",)),
        ({"state_dict": {**prefixed("module.encoder_q."), "module.queue": torch.zeros(4)}},
         "state_dict.module.encoder_q", ("module.queue",)),
        ({"n_averaged": torch.tensor(7), **prefixed("module.")}, "module", ("n_averaged",)),
        ({"model_ema": STATE}, "model_ema", ()),
        ({"net": {"state": STATE}, "args": argparse.Namespace()}, "net.state", ()),
        ({"optimizer": {"state": {0: {"momentum_buffer": torch.ones(1)}}}, "model": STATE},
         "model", ()),
        ({**STATE, "fc.0.weight": torch.ones(2, 1), "fc.2.bias": torch.ones(2)},
         "", ("fc.0.weight", "fc.2.bias")),
        ({"model": {**prefixed("module."), "module.fc.0.weight": torch.ones(2)}},
         "model.module", ("module.fc.0.weight",)),
        ({**STATE, "epoch": 3, "arch": "resnet50"}, "", ()),
        (nested("abcdefgh"), "a.b.c.d.e.f.g.h", ()),
        ({"model": STATE, "param_shapes": {name: [1] for name in STATE}}, "model", ()),
    ],
)  # fmt: skip
def test_nested_state_dicts(content, entry, unused, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    for source in (content, tmp_path / "w.pth"):
        weights = read_weights(source)
        assert equals(weights.tensors)
        assert (weights.entry, weights.other_entries) == (entry, ())
        assert weights.unused == unused
        assert weights.source_names["res2.0.conv3.weight"] == "layer1.0.conv3.weight"


@pytest.mark.parametrize(
    ("content", "entry", "other"),
    [
        ({"state_dict": ZEROS, "state_dict_ema": STATE}, "state_dict_ema", "state_dict"),
        ({"model": ZEROS, "model_ema": {"n_averaged": torch.tensor(7), **prefixed("module.")}},
         "model_ema.module", "model"),
        # mmengine stores the average under state_dict.
        ({"state_dict": STATE, "ema_state_dict": prefixed("module.", ZEROS)},
         "state_dict", "ema_state_dict.module"),
        ({**prefixed("module.encoder_q."), **prefixed("module.encoder_k.", ZEROS)},
         "module.encoder_q", "module.encoder_k"),
    ],
)  # fmt: skip
def test_one_of_two_networks_is_read_and_named(content, entry, other, tmp_path, capsys):
    weights = read_weights(content)
    assert equals(weights.tensors)
    assert (weights.entry, weights.other_entries) == (entry, (other,))
    weights = read_weights(content, entry=other)
    assert not weights.tensors["head.linear.weight"].any()
    assert (weights.entry, weights.other_entries) == (other, (entry,))

    torch.save(content, tmp_path / "w.pth")
    command = ["convert", str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors")]
    assert cli.main(command) == 0
    assert f"5 tensors of {entry} (--entry selects {other}) with" in capsys.readouterr().out
    assert equals(read_weights(tmp_path / "w.safetensors").tensors)
    assert cli.main([*command, "--entry", other]) == 0
    assert not read_weights(tmp_path / "w.safetensors").tensors["head.linear.weight"].any()


def test_entry_is_a_leading_part_of_one_name():
    content = {"state_dict": prefixed("module."), "state_dict_ema": prefixed("module.", ZEROS)}
    assert equals(read_weights(content, entry="state_dict").tensors)
    assert equals(read_weights(content, entry="state_dict.module").tensors)
    for wrong in ("state", "module", "state_dict.mod", ""):
        with pytest.raises(ValueError, match=rf"0 entries match '{wrong}'; choose one of state_"):
            read_weights(content, entry=wrong)
    with pytest.raises(ValueError, match=r"2 entries match 'x'; choose one of x\.a, x\.b"):
        read_weights({"x": {"a": STATE, "b": STATE.copy()}}, entry="x")


@pytest.mark.parametrize("names", [("student", "teacher"), ("state_dict_ema", "model_ema")])
def test_networks_of_equal_rank_need_a_choice(names):
    content = {names[0]: ZEROS, names[1]: prefixed("backbone.")}
    with pytest.raises(ValueError, match=rf"choose one of .*{names[0]}, {names[1]}\.backbone"):
        read_weights(content)
    assert equals(read_weights(content, entry=names[1]).tensors)


def test_not_converted_tensors_are_named(tmp_path, capsys):
    torch.save({**prefixed("backbone."), "head.fc.weight": torch.ones(1)}, tmp_path / "w.pth")
    assert cli.main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors")]) == 0
    assert "not converted: head.fc.weight\n" in capsys.readouterr().out


@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model",), ("state_dict", "model")])
def test_unknown_networks_are_refused_with_their_names(keys):
    content = {"stem.weight": torch.zeros(1)}
    for key in reversed(keys):
        content = {"epoch": 1, key: content}
    with pytest.raises(ValueError, match=r"unknown network with tensors stem\.weight; supported"):
        read_weights(content)


def test_nesting_without_end_takes_no_time():
    with pytest.raises(ValueError, match="not a state dict"):
        read_weights(nested("abcdefghi"))
    content = {}
    for _ in range(4):
        content = {str(i): content for i in range(2000)}
    with pytest.raises(ValueError, match="not a state dict"):
        read_weights(content)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(dtype, value):
    state = {name: tensor.to(dtype, copy=True) for name, tensor in STATE.items()}
    read_weights(state)
    state["conv1.weight"][0, 1] = value
    with pytest.raises(ValueError, match=r"conv1\.weight is NaN or infinite in 1 of 3 values"):
        read_weights(state)


def test_expanded_tensors_are_refused(tmp_path):
    """A file of 2 kB would become a tensor of 4 TB when copied."""
    torch.save({**STATE, "fc.bias": torch.zeros(1).expand(10**12)}, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 5000
    with pytest.raises(ValueError, match=r"fc\.bias of shape \(1000000000000,\) is larger than"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_and_quantized_tensors_are_refused():
    with pytest.raises(ValueError, match=r"fc\.bias is sparse or quantized"):
        read_weights({**STATE, "fc.bias": torch.eye(2).to_sparse()})
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"fc\.bias is sparse or quantized"):
        read_weights({**STATE, "fc.bias": quantized})


def test_arrays_of_a_pickle_are_tensors_and_scalars_are_not():
    blobs = {"conv1_gn_s": np.ones(2), "conv1_w": np.ones((2, 3, 1, 1), np.float32)}
    solver = {"lr": np.array(0.1), "conv1_w_momentum": np.ones(2), "model_iter": 7}
    weights = read_weights({**blobs, **solver})
    assert weights.tensors.keys() == {"norm1.weight", "conv1.weight"}
    assert weights.unused == ()


@pytest.mark.parametrize("shape", [(2,), (2, 3, 7), (2, 4, 7, 7), (2, 1, 5, 7, 7)])
@pytest.mark.parametrize(
    "names", [("conv1.weight", "layer1.0.conv3.weight"), ("conv1_w", "conv1_gn_s")]
)
def test_conv1_of_another_network(shape, names):
    with pytest.raises(ValueError, match=rf"{names[0]} has shape .*; expected \(O, 3, H, W\) or"):
        read_weights({names[0]: torch.zeros(shape), names[1]: torch.zeros(1)})


def test_incomplete_state_dicts_are_read():
    """Loading names what is missing; reading must not fail before."""
    for names in (["conv1_gn_s"], ["res_conv1_bn_s"], ["layer1.0.conv3.weight", "fc.weight"]):
        state = {name: torch.zeros(2) for name in names}
        assert len(read_weights(state).tensors) == len(names)


@pytest.mark.parametrize("config", [{}, {"model": {}}, "resnet50", {"model": {"norm": "gn"}}])
def test_config_of_another_program(config):
    with pytest.raises(ValueError, match="its config was not written by this version of i3d_gn"):
        read_weights({"config": config, "input": {}, "model": STATE})
