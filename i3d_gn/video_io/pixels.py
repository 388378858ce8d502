"""From a decoded frame to output pixels: crop, scale, convert to RGB, turn upright, flip.

The crop comes before scaling, on the decoder's YUV planes, so that only pixels that are kept are
scaled and converted. Its corners must be integers there and, with subsampled chroma, even; those of
a window of the *resized* frame generally map to neither. So the source window is extended until its
edges map (nearly) to integer positions in the resized frame, and cropped to the window afterwards::

    source    0   2   4   6   8   10  12        scale s = 5/4
    resized   0   2.5 5   7.5 10  12.5 15
    wanted                  [8    13)           from source 6.4: edge 6 falls on 7.5, edge 4 on 5
    extended          [5 ..             15)     4 -> 5, exactly; crop 3 pixels on the left

The window is thus displaced by at most `_EDGE_TOLERANCE` of a pixel. Scaling is bilinear; when
shrinking, swscale widens the filter as torchvision does with `antialias=True`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import av
import numpy as np
from av.error import FFmpegError
from av.filter import Graph
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from i3d_gn.video_io.crop_plan import CropPlan

_T = TypeVar("_T")

_COLOR_TAGS = ("color_trc", "color_primaries", "colorspace")
_UNSPECIFIED = 2  # ITU-T H.273, the same for the three

_EDGE_TOLERANCE = 0.05  # pixels of the resized frame
_MOST_BEYOND = 64  # source pixels, see SourceWindow.beyond

# Scaled as YUV, then converted to RGB: swscale's unscaled converter is twice as fast as scaling
# into RGB and rounds without bias (scaling into RGB shifts all colors by about +-1.2). It supports
# only these formats and even heights.
_TWO_STEP_FORMATS = ("yuv420p", "yuvj420p")


class Orientation(NamedTuple):
    """How to turn a stored frame upright: transpose first, then flip."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def upright_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(height, width) of the frame when upright, in pixels."""
        size = (frame.height, frame.width)
        return (size[1], size[0]) if self.transpose else size


class SourceWindow(NamedTuple):
    """One axis of a crop.

    Source pixels `start` to `start + size - 1` are scaled to `scaled` pixels, of which the first
    `offset` are skipped. The last `beyond` source pixels lie outside the frame and repeat its edge.
    """

    start: int
    size: int
    scaled: int
    offset: int
    beyond: int = 0


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Rotation and mirroring from the display matrix, if it is a multiple of 90 degrees.

    The display matrix (libavutil `display.h`) maps a stored column p and row q to
    `x = a p + c q` and `y = b p + d q`. Any other matrix is ignored.
    """
    try:
        side_data = frame.side_data.get(cast("Any", SideDataType.DISPLAYMATRIX))
    except ValueError:
        _accept_unknown_side_data()
        side_data = frame.side_data.get(cast("Any", SideDataType.DISPLAYMATRIX))
    if side_data is None:
        return Orientation()
    a, b, _, c, d = memoryview(cast("Any", side_data)).cast("B").cast("i")[:5].tolist()
    if b == c == 0 and a and d:
        return Orientation(False, d < 0, a < 0)
    if a == d == 0 and b and c:
        return Orientation(True, b < 0, c < 0)
    return Orientation()


def _accept_unknown_side_data() -> None:
    """Make PyAV name kinds of side data that it does not know by their number.

    Up to version 18 it refuses access to all side data of a frame with such a kind (EXIF, views of
    stereo video, ...).
    """

    def unknown(cls: type[SideDataType], value: object) -> SideDataType:
        member = object.__new__(cls)
        member._name_, member._value_ = f"UNKNOWN_{value}", value
        return member

    SideDataType._missing_ = classmethod(unknown)  # type: ignore[method-assign]


def source_window(
    original: int, resized: int, start: int, size: int, *, alignment: int, extend: bool
) -> SourceWindow:
    """The source pixels needed for `size` pixels at `start` of a resized axis.

    Args:
        original: Length of the axis before resizing, in pixels.
        resized: Its length after resizing.
        start: Start of the window, in pixels of the resized axis.
        size: Length of the window, in pixels of the resized axis.
        alignment: Chroma subsampling factor. The window's start in the source is a multiple of it,
            and its scaled size is where possible.
        extend: Whether the source window may extend past the end of the axis.
    """
    scale = resized / original
    # The filter needs its support on both sides of the window, in chroma pixels.
    margin = math.ceil(alignment * max(1.0, 1 / scale)) + 1

    first = max(0, math.floor(start / scale) - margin)
    lefts = [
        left
        for left in range(first - first % alignment, -1, -alignment)
        if abs(left * scale - round(left * scale)) <= _EDGE_TOLERANCE
    ]
    # The right edge: aligned if possible; else slightly past the end of the frame; else at its end,
    # whatever the scaled size.
    needed = min(math.ceil((start + size) / scale) + margin, original)
    rights = [*range(needed + -needed % alignment, original + 1, alignment)]
    if extend:
        most_beyond = min(_MOST_BEYOND, (original - lefts[0]) // 2)
        rights += range(original + alignment, original + most_beyond + 1, alignment)
    for left, right in itertools.product(lefts, rights):
        scaled_left = round(left * scale)
        wanted = right * scale - scaled_left
        scaled = alignment * round(wanted / alignment)
        if abs(wanted - scaled) <= _EDGE_TOLERANCE:
            break
    else:
        left, right = lefts[0], original
        scaled_left = round(left * scale)
        scaled = resized - scaled_left
    return SourceWindow(left, right - left, scaled, start - scaled_left, max(0, right - original))


class _ColorTags:
    """Resets color tags that swscale refuses, for all frames of a video from the first refusal on.

    First the transfer characteristics and primaries, which do not matter for conversion to RGB,
    then the matrix as well, for which swscale then uses BT.601.
    """

    def __init__(self) -> None:
        self._reset: tuple[str, ...] = ()

    def convert(self, frame: av.VideoFrame, convert: Callable[[av.VideoFrame], _T]) -> _T:
        """`convert(frame)`, called again with fewer tags if it fails."""
        while True:
            for tag in self._reset:
                setattr(frame, tag, _UNSPECIFIED)
            try:
                return convert(frame)
            except (FFmpegError, OSError):
                if len(self._reset) == len(_COLOR_TAGS):
                    raise
                self._reset = _COLOR_TAGS[: 3 if self._reset else 2]


class FrameWriter:
    """Writes frames of one video, or unscaled crops of them, to rows of an array.

    Whole frames are converted to RGB, so that a crop is bit-identical to that part of the frame.

    Args:
        plan: Crop and flip, in terms of the upright frame; its resized size is the frame's own.
        orientation: Orientation of the stored frames.
        size: `(height, width)` of the stored frames, in pixels. A stream may change its size;
            frames of another size are scaled to this one.
    """

    def __init__(self, plan: CropPlan, *, orientation: Orientation, size: tuple[int, int]) -> None:
        self._plan = plan
        self._orientation = orientation
        self._height, self._width = size
        self._reformatter = VideoReformatter()
        self._tags = _ColorTags()

    def write(self, frame: av.VideoFrame, row: np.ndarray) -> None:
        """Write `frame` to `row`, uint8 `(H, W, 3)`."""
        pixels = _pixels_of(self._tags.convert(frame, self._to_rgb))
        if self._orientation.transpose:
            pixels = pixels.transpose(1, 0, 2)
        if self._orientation.flip_rows:
            pixels = pixels[::-1]
        if self._orientation.flip_columns:
            pixels = pixels[:, ::-1]
        plan = self._plan
        window = pixels[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]
        np.copyto(row, window[:, ::-1] if plan.flip else window)

    def _to_rgb(self, frame: av.VideoFrame) -> av.VideoFrame:
        return self._reformatter.reformat(
            frame, width=self._width, height=self._height, format="rgb24", threads=1
        )


class CropWriter:
    """Writes resized crops of frames of one video to rows of an array.

    Args:
        plan: Resize, crop and flip, in terms of the upright frame.
        orientation: Orientation of the stored frames.
    """

    def __init__(self, plan: CropPlan, *, orientation: Orientation) -> None:
        self._orientation = orientation
        self._plan = _stored(plan, orientation)
        self._key = None
        self._tags = _ColorTags()

    def write(self, frame: av.VideoFrame, row: np.ndarray) -> None:
        """Write `frame` to `row`, uint8 `(H, W, 3)`."""
        pixels = _pixels_of(self._tags.convert(frame, self._filter))[self._cut]
        np.copyto(row, pixels[::-1] if self._orientation.flip_rows else pixels)

    def _filter(self, frame: av.VideoFrame) -> av.VideoFrame:
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if key != self._key:
            self._key = None
            self._build(frame)
        try:
            self._source.push(frame)
            filtered = cast("av.VideoFrame", self._sink.pull())
        except (FFmpegError, OSError):
            self._key = None  # the graph is spent
            raise
        self._key = key
        return filtered

    def _build(self, frame: av.VideoFrame) -> None:
        """Build the filter graph (crop, scale, RGB, upright, flip) for frames like this one."""
        plan = self._plan
        alignments = (64 // frame.format.chroma_height(64), 64 // frame.format.chroma_width(64))
        # With subsampled chroma, the pad filter rounds odd sizes down.
        extend = frame.height % alignments[0] == 0 == frame.width % alignments[1]
        vertical = source_window(
            frame.height,
            plan.resize_height,
            plan.top,
            plan.height,
            alignment=alignments[0],
            extend=extend,
        )
        horizontal = source_window(
            frame.width,
            plan.resize_width,
            plan.left,
            plan.width,
            alignment=alignments[1],
            extend=extend,
        )
        height, width = plan.height, plan.width
        inside = (horizontal.size - horizontal.beyond, vertical.size - vertical.beyond)
        filters: list[tuple[str, str | None]] = [
            ("crop", f"{inside[0]}:{inside[1]}:{horizontal.start}:{vertical.start}:exact=1")
        ]
        if horizontal.beyond or vertical.beyond:
            edges = f"right={horizontal.beyond}:bottom={vertical.beyond}"
            filters.append(("pad", f"{horizontal.size}:{vertical.size}"))
            filters.append(("fillborders", f"{edges}:mode=smear"))
        scale = f"{horizontal.scaled}:{vertical.scaled}:flags=bilinear+accurate_rnd"
        # Drop a last row that would make the height odd if the window does not need it.
        even = vertical.scaled - vertical.scaled % 2
        if frame.format.name in _TWO_STEP_FORMATS and vertical.offset + height <= even:
            filters += [("scale", scale), ("format", frame.format.name)]
            filters.append(("crop", f"{horizontal.scaled}:{even}:0:0:exact=1"))
            filters += [("scale", "flags=bilinear"), ("format", "rgb24")]
        else:
            filters += [("scale", scale + "+full_chroma_int"), ("format", "rgb24")]
        if self._orientation.transpose:
            filters.append(("transpose", "cclock_flip"))  # a matrix transpose
            vertical, horizontal = horizontal, vertical
            height, width = width, height
        top, left = vertical.offset, horizontal.offset
        if self._orientation.flip_columns ^ plan.flip:
            filters.append(("hflip", None))  # faster than copying from a flipped view
            left = horizontal.scaled - left - width
        self._cut = (slice(top, top + height), slice(left, left + width))

        graph = Graph()
        graph.threads = 1
        source = (
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
            f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        )
        nodes = [graph.add(name, options) for name, options in [("buffer", source), *filters]]
        nodes.append(graph.add("buffersink"))
        graph.link_nodes(*nodes).configure()
        # Source and sink do not keep the graph alive.
        self._graph, self._source, self._sink = graph, nodes[0], nodes[-1]


def _pixels_of(frame: av.VideoFrame) -> np.ndarray:
    """View of the pixels of an rgb24 frame, `(H, W, 3)`."""
    plane = frame.planes[0]
    strides = (plane.line_size, 3, 1)
    return np.ndarray((frame.height, frame.width, 3), np.uint8, cast("Any", plane), strides=strides)


def _stored(plan: CropPlan, orientation: Orientation) -> CropPlan:
    """The plan in terms of the stored frame, before it is turned upright.

    The plan's own flip is unchanged, as it comes last, on upright columns.
    """
    top, left = plan.top, plan.left
    if orientation.flip_rows:
        top = plan.resize_height - plan.top - plan.height
    if orientation.flip_columns:
        left = plan.resize_width - plan.left - plan.width
    plan = replace(plan, top=top, left=left)
    if not orientation.transpose:
        return plan
    return CropPlan(
        resize_height=plan.resize_width,
        resize_width=plan.resize_height,
        top=plan.left,
        left=plan.top,
        height=plan.width,
        width=plan.height,
        flip=plan.flip,
    )
