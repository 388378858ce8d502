"""What a network costs: layers and their output shapes, parameters, multiply-adds, memory.

Everything is computed on the meta device, from shapes alone.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from i3d_gn.engine.activation_memory import step_bytes
from i3d_gn.engine.checkpoint import load_checkpoint
from i3d_gn.engine.markdown import markdown_table
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.norm.functional import KERNEL_VARIABLE
from i3d_gn.video import build
from i3d_gn.video.config import Config, config_of_checkpoint, load_config

GPU_GIB = (8, 16, 24, 40, 80)
# Set aside for the CUDA context, cuDNN's workspaces and fragmentation.
RESERVED_GIB = 1.5
# Compared in memory; layer norm and instance norm take as much as group norm.
COMPARED_NORMS = ("gn", "bn", "frozen_bn")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A row of the table of layers.

    Attributes:
        name: Of the module.
        output_shape: (C, T, H, W) for one clip; (K,) for the classifier.
        num_parameters: Of the module and all modules in it.
        multiply_adds: Of its convolutions and linear layers, for one clip.
    """

    name: str
    output_shape: tuple[int, ...]
    num_parameters: int
    multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of training with a norm, in bytes, for a number n of clips per GPU.

    Attributes:
        saved_per_clip: Activations that forward saves for backward.
        fixed: Weights, gradients and momentum.
        peak_per_clip: What each clip adds to the peak of a step.
    """

    norm: str
    saved_per_clip: int
    fixed: int
    peak_per_clip: int

    def largest_clips_per_gpu(self, gib: float) -> int:
        """The largest n that fits a GPU of this much memory, 0 if not even one clip does."""
        free = (gib - RESERVED_GIB) * 2**30 - self.fixed
        return max(0, int(free // self.peak_per_clip))


def config_of(source: Path, overrides: Sequence[str]) -> Config:
    """The config in a YAML file or a checkpoint, with overrides.

    Raises:
        ConfigError: As `load_config`; or overrides are given for a checkpoint.
        CheckpointError: The checkpoint is unreadable.
    """
    if source.suffix != ".pt" and not source.is_dir():
        return load_config(source, overrides)
    if overrides:
        raise ConfigError(
            f"override {overrides[0]!r}: {source} is a checkpoint, whose config is fixed; "
            "give a YAML file"
        )
    return config_of_checkpoint(load_checkpoint(source), source)


def layers(config: Config) -> list[Layer]:
    """The units of the network in the order in which they run, blocks of stages one by one."""
    model = _build(config).eval()
    units = dict(_units(model))
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor | list[Tensor]) -> None:
            # Where two pathways meet, that of the first.
            first = output if isinstance(output, Tensor) else output[0]
            shapes[name] = tuple(first.shape[1:])

        return hook

    hooks = [unit.register_forward_hook(note(name)) for name, unit in units.items()]
    # A layer without convolutions counts nothing, and is absent from the counter.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(_clips(config))
    for hook in hooks:
        hook.remove()
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    return [
        Layer(
            name,
            shape,
            sum(p.numel() for p in units[name].parameters()),
            flops.get(f"{root}.{name}", 0) // 2,
        )
        for name, shape in shapes.items()
    ]


def memory(config: Config, norm: str) -> Memory:
    """Memory of a training step of `config` on a GPU, with `norm` in place of its own."""
    model_config = config.model
    if norm != model_config.norm:
        model_config = dataclasses.replace(
            model_config, norm=norm, num_groups=None, channels_per_group=None
        )
    config = dataclasses.replace(config, model=model_config)
    clip = config.clip
    dtype = _DTYPES[config.train.precision]

    def measure(num_clips: int) -> tuple[int, int]:
        shape = (num_clips, 3, clip.num_frames, clip.crop_size, clip.crop_size)
        return step_bytes(model, shape, dtype)

    model = _build(config).train()
    with _kernels_of_a_gpu():
        # Batch norm may not train on a single clip.
        (saved_by_2, peak_of_2), (saved_by_3, peak_of_3) = measure(2), measure(3)
    num_parameters = sum(p.numel() for p in model.parameters())
    cast = 0 if dtype == torch.float32 else dtype.itemsize  # autocast's copies of the weights
    values = 3 * clip.num_frames * clip.crop_size**2
    # A clip is on the GPU as uint8, as float32 and in the dtype of the first convolution.
    clip_bytes = values * (1 + 4 + (cast and dtype.itemsize))
    per_clip = peak_of_3 - peak_of_2
    return Memory(
        norm,
        saved_by_3 - saved_by_2,
        fixed=num_parameters * (4 + 4 + 4 + cast) + max(0, peak_of_2 - 2 * per_clip),
        peak_per_clip=per_clip + clip_bytes,
    )


def describe(config: Config) -> str:
    """The layers and the memory as Markdown tables."""
    rows, clip = layers(config), config.clip
    num_parameters = sum(p.numel() for p in _build(config).parameters())
    multiply_adds = sum(row.multiply_adds for row in rows)
    table = [("layer", "output (C, T, H, W)", "parameters", "multiply-adds")]
    for row in rows:
        shape = ", ".join(map(str, row.output_shape))
        parameters = f"{row.num_parameters:,}" if row.num_parameters else ""
        table.append((row.name, shape, parameters, _giga(row.multiply_adds)))
    fits = [["norm", "saved", "peak", "fixed", *(f"{gib} GB" for gib in GPU_GIB)]]
    for norm in dict.fromkeys((config.model.norm, *COMPARED_NORMS)):
        needed = memory(config, norm)
        counts = (needed.saved_per_clip, needed.peak_per_clip, needed.fixed)
        clips = (str(needed.largest_clips_per_gpu(gib)) for gib in GPU_GIB)
        fits.append([norm, *(f"{count / 1e6:,.1f} MB" for count in counts), *clips])
    return f"""\
{config.model.name}, {config.model.norm}: {num_parameters:,} parameters, \
{multiply_adds / 1e9:,.2f} G multiply-adds per clip of \
{clip.num_frames} x {clip.crop_size} x {clip.crop_size}

{markdown_table(table)}

Memory of training in {config.train.precision}, counted from shapes:
saved: activations that one clip saves for backward; peak: what a clip adds to the peak of a step;
fixed: weights, gradients and momentum. Then the largest clips_per_gpu that fits a GPU of this size
with train.cuda_graphs=false, and with {RESERVED_GIB} GB set aside for CUDA, cuDNN's workspaces and
fragmentation. The activations of CUDA graphs stay allocated during validation: take less with them.

{markdown_table(fits)}"""


def _giga(multiply_adds: int) -> str:
    return f"{multiply_adds / 1e9:.4f} G" if multiply_adds else ""


def _build(config: Config) -> nn.Module:
    with _META:  # initialized there too, which takes no time
        return build.build_model(config, _META)


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules, with their names, that together are the network; blocks of stages one by one."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        has_lists = any(isinstance(m, nn.ModuleList) for m in (child, *child.children()))
        if has_lists or path == "net":  # of an AdaptedNetwork
            yield from _units(child, f"{path}.")
        elif isinstance(child, nn.Sequential):
            for inner_name, inner in child.named_children():
                yield f"{path}.{inner_name}", inner
        else:
            yield path, child


def _clips(config: Config) -> Tensor:
    clip = config.clip
    return torch.empty(1, 3, clip.num_frames, clip.crop_size, clip.crop_size, device=_META)


@contextmanager
def _kernels_of_a_gpu() -> Iterator[None]:
    """Use the fused kernels, which a GPU does, unless the environment says otherwise."""
    if KERNEL_VARIABLE in os.environ or find_spec("triton") is None:
        yield
        return
    os.environ[KERNEL_VARIABLE] = "triton"
    try:
        yield
    finally:
        del os.environ[KERNEL_VARIABLE]
