"""From a decoded frame to the pixels asked for: crop, scale, RGB, upright, flipped.

The crop is taken before scaling, on the decoder's own YUV planes, so that only what is kept is
scaled and converted. Crop corners there are whole and, with subsampled chroma, even, which a
window of the *resized* frame in general is not. So the source window is grown outwards until its
edges fall (nearly) on whole pixels of the resized frame, and cut to the window afterwards::

    source    0   2   4   6   8   10  12        scale s = 5/4
    resized   0   2.5 5   7.5 10  12.5 15
    wanted                  [8    13)           from source 6.4: edge 6 falls on 7.5, edge 4 on 5
    grown             [5 ..             15)     5 -> 5, exactly; cut 3 pixels off the left

The window so lies within ``_EDGE_TOLERANCE`` of a pixel of where it should. Scaling is bilinear,
and when it shrinks swscale widens the filter as torchvision does with ``antialias=True``.
"""

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from i3d_gn.video_io.crop_plan import CropPlan

_EDGE_TOLERANCE = 0.05  # pixels of the resized frame
_MOST_BEYOND = 64  # source pixels, see SourceWindow.beyond

# Scaled as YUV first and converted to RGB after: swscale's unscaled converter is twice as fast as
# scaling into RGB and rounds without bias (scaling into RGB shifts all colours by about +-1.2). It
# takes these formats and even heights only.
_TWO_STEP_FORMATS = ("yuv420p", "yuvj420p")


class Orientation(NamedTuple):
    """How a stored frame is turned to be upright: transpose first, then flip."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


class SourceWindow(NamedTuple):
    """One axis of a crop.

    Source pixels ``start ... start + size - 1`` become ``scaled`` pixels, of which ``offset`` are
    skipped. The last ``beyond`` of the source pixels lie outside the frame and repeat its edge.
    """

    start: int
    size: int
    scaled: int
    offset: int
    beyond: int = 0


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Rotation and mirroring that the file asks for, in quarter turns; others are not applied.

    The display matrix (libavutil ``display.h``) maps a stored column p and row q to
    ``x = a p + c q`` and ``y = b p + d q``.
    """
    side_data = frame.side_data.get(cast("Any", SideDataType.DISPLAYMATRIX))
    if side_data is None:
        return Orientation()
    a, b, _, c, d = memoryview(cast("Any", side_data)).cast("B").cast("i")[:5].tolist()
    if b == c == 0 and a and d:
        return Orientation(False, d < 0, a < 0)
    if a == d == 0 and b and c:
        return Orientation(True, b < 0, c < 0)
    return Orientation()


def source_window(
    original: int, resized: int, start: int, size: int, *, alignment: int, extend: bool
) -> SourceWindow:
    """The source pixels from which ``size`` pixels at ``start`` of a resized axis can be had.

    Args:
        original: length of the whole axis before resizing.
        resized: its length after resizing.
        start: of the window wanted, in pixels of the resized axis.
        size: of that window.
        alignment: chroma subsampling; the window's start in the source and its scaled size are
            multiples of it, the latter where that can be had.
        extend: whether the window may go beyond the end of the axis.
    """
    scale = resized / original
    # Beyond the window the filter needs its support on both sides, in chroma pixels.
    margin = math.ceil(alignment * max(1.0, 1 / scale)) + 1

    first = max(0, math.floor(start / scale) - margin)
    lefts = [
        left
        for left in range(first - first % alignment, -1, -alignment)
        if abs(left * scale - round(left * scale)) <= _EDGE_TOLERANCE
    ]
    # The right edge: aligned if it can be; else beyond the frame, a little; else at its end, with a
    # size as it comes.
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


class FrameWriter:
    """Writes frames of one video, or windows of them, into rows of an array, unscaled.

    Whole frames are converted to RGB, so that a window holds to the bit what the frame does.

    Args:
        plan: in terms of the upright frame; its resized size is the frame's own.
        orientation: of the stored frames.
        size: ``(height, width)`` of the stored frames. Streams may change theirs; frames of another
            size are scaled to this one.
    """

    def __init__(self, plan: CropPlan, *, orientation: Orientation, size: tuple[int, int]) -> None:
        self._plan = plan
        self._orientation = orientation
        self._height, self._width = size
        self._reformatter = VideoReformatter()

    def write(self, frame: av.VideoFrame, row: np.ndarray) -> None:
        """Convert ``frame`` into ``row``, uint8 ``(H, W, 3)``."""
        rgb = self._reformatter.reformat(
            frame, width=self._width, height=self._height, format="rgb24", threads=1
        )
        pixels = _pixels_of(rgb)
        if self._orientation.transpose:
            pixels = pixels.transpose(1, 0, 2)
        if self._orientation.flip_rows:
            pixels = pixels[::-1]
        if self._orientation.flip_columns:
            pixels = pixels[:, ::-1]
        plan = self._plan
        window = pixels[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]
        np.copyto(row, window[:, ::-1] if plan.flip else window)


class CropWriter:
    """Writes resized crops of frames of one video into rows of an array.

    Args:
        plan: in terms of the upright frame.
        orientation: of the stored frames.
    """

    def __init__(self, plan: CropPlan, *, orientation: Orientation) -> None:
        self._orientation = orientation
        self._plan = _stored(plan, orientation)
        self._key = None

    def write(self, frame: av.VideoFrame, row: np.ndarray) -> None:
        """Convert ``frame`` into ``row``, uint8 ``(H, W, 3)``."""
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if key != self._key:
            self._build(frame)
            self._key = key
        self._source.push(frame)
        pixels = _pixels_of(cast("av.VideoFrame", self._sink.pull()))[self._cut]
        np.copyto(row, pixels[::-1] if self._orientation.flip_rows else pixels)

    def _build(self, frame: av.VideoFrame) -> None:
        """Set up the filter graph: crop, scale, RGB, upright, flip, for frames like this one."""
        plan = self._plan
        alignments = (64 // frame.format.chroma_height(64), 64 // frame.format.chroma_width(64))
        # Where chroma is subsampled, the filter that extends a frame cuts odd sizes.
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
        # A last row that would make the height odd is left out where the window does not need it.
        even = vertical.scaled - vertical.scaled % 2
        if frame.format.name in _TWO_STEP_FORMATS and vertical.offset + height <= even:
            filters += [("scale", scale), ("format", frame.format.name)]
            filters.append(("crop", f"{horizontal.scaled}:{even}:0:0:exact=1"))
            filters += [("scale", "flags=bilinear"), ("format", "rgb24")]
        else:
            filters += [("scale", scale + "+full_chroma_int"), ("format", "rgb24")]
        if self._orientation.transpose:
            filters.append(("transpose", "cclock_flip"))  # the plain transpose of a matrix
            vertical, horizontal = horizontal, vertical
            height, width = width, height
        top, left = vertical.offset, horizontal.offset
        if self._orientation.flip_columns ^ plan.flip:
            filters.append(("hflip", None))  # quicker than a copy from a flipped view
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
        # The graph must outlive its ends, which do not keep it alive.
        self._graph, self._source, self._sink = graph, nodes[0], nodes[-1]


def _pixels_of(frame: av.VideoFrame) -> np.ndarray:
    """The pixels of an rgb24 frame, ``(H, W, 3)``, as a view."""
    plane = frame.planes[0]
    strides = (plane.line_size, 3, 1)
    return np.ndarray((frame.height, frame.width, 3), np.uint8, cast("Any", plane), strides=strides)


def _stored(plan: CropPlan, orientation: Orientation) -> CropPlan:
    """The plan's window in the frame as stored, before it is turned upright.

    The plan's own flip is left as it is: it comes last, on upright columns.
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
