"""The packet of each frame of a file, found without decoding.

A container stores packets in decoding order; frames are numbered in presentation order. In files
where every packet is one shown frame, sorting the packets' timestamps (pts) numbers the frames::

    packet (decoding order)    0   1   2   3   4   5   6
    type                       I   P   B   B   P   B   B
    pts                        0   3   1   2   6   4   5
    frame                      0   3   1   2   6   4   5

`FrameTable.fallback_reason` says why this may not hold for a file, whose frames must then be
counted by decoding from the start. Decoding a frame starts at the last *safe* keyframe shown no
later than the frame. Frames stored after the keyframe of an open GOP but shown before it (leading
pictures) also need the previous GOP::

    packet       0   1   2 | 3   4   5         packet 3 is an open-GOP keyframe
    pts          0   1   2 | 5   3   4         decoding of frames 3 and 4 (packets 4 and 5) starts
    frame        0   1   2   5   3   4         at packet 0, of frame 5 at packet 3

Whether a keyframe is safe, and whether decoding may start anywhere but at the first packet, is read
from the packets by `bitstream`.
"""

from dataclasses import dataclass

import av
import numpy as np
from av.packet import PktSideDataT

from i3d_gn.video_io.bitstream import inspector_of

# Containers that store a timestamp for every frame, and codecs with one shown frame per packet.
_TRUSTED_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
_TRUSTED_CODECS = frozenset({"h264", "hevc", "vp9", "av1"})

# Frames in the decoded picture buffer of H.264 (A.3.1) and HEVC (A.4.2).
_MAX_WAITING = 16


@dataclass(frozen=True)
class FrameTable:
    """Packets of one video stream, in decoding order.

    Attributes:
        packet_pts: int64 `(num_packets,)`; 0 where a packet has no timestamp.
        packet_frame: int64 `(num_packets,)`, the frame of each packet; -1 for packets that an
            edit list discards, which are decoded for reference but not shown.
        frame_packet: int64 `(num_frames,)`, the packet of each frame.
        packet_seek: int64 `(num_packets,)`, the timestamp by which to seek to a packet.
        safe_key: bool `(num_packets,)`, packets at which decoding may start.
        is_idr: bool `(num_packets,)`, IDR pictures of H.264.
        is_unreferenced: bool `(num_packets,)`, packets that no other is known to need, in H.264.
        fallback_reason: Why packets may not correspond to frames, or why decoding must start at the
            first packet; or `None`.
    """

    packet_pts: np.ndarray
    packet_frame: np.ndarray
    frame_packet: np.ndarray
    packet_seek: np.ndarray
    safe_key: np.ndarray
    is_idr: np.ndarray
    is_unreferenced: np.ndarray
    fallback_reason: str | None

    @property
    def num_frames(self) -> int:
        """Number of frames that are shown."""
        return len(self.frame_packet)

    @property
    def frame_pts(self) -> np.ndarray:
        """int64 `(num_frames,)`, strictly increasing if there is no `fallback_reason`."""
        return self.packet_pts[self.frame_packet]

    def packet_ranges(self, frames: np.ndarray) -> list[tuple[int, int]]:
        """Ranges `(first, last + 1)` of packets to decode, in order, to get `frames`.

        Every range starts at a safe keyframe, where the decoder is reset. It includes one packet
        more than needed: if timestamps contradict the stream, that frame comes out of order.
        """
        keys = np.flatnonzero(self.safe_key)
        packets = self.frame_packet[np.unique(frames)]
        before = np.searchsorted(keys, packets, side="right") - 1
        while True:  # a leading picture of an open GOP: start at the keyframe before
            early = (self.packet_pts[keys[before]] > self.packet_pts[packets]) & (before > 0)
            if not early.any():
                break
            before[early] -= 1

        ranges: list[tuple[int, int]] = []
        for key in np.unique(before):
            first, stop = int(keys[key]), int(packets[before == key].max()) + 1
            stop += stop < len(self.safe_key) and not self.safe_key[stop]
            if ranges and first < ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
            else:
                ranges.append((first, stop))
        return ranges


class FrameTableBuilder:
    """Builds a `FrameTable` from packets as they are read.

    Attributes:
        num_shown: Number of packets so far that no edit list discards.
    """

    def __init__(self, *, container: str, codec: str, extradata: bytes) -> None:
        self._fallback_reason: str | None = None
        if container not in _TRUSTED_CONTAINERS:
            self._fallback_reason = f"{container} files may lack timestamps of frames"
        elif codec not in _TRUSTED_CODECS:
            self._fallback_reason = f"a {codec} packet may hold no frame or several"
        self.num_shown = 0
        self._inspector = inspector_of(codec, extradata)
        self._pts: list[int] = []
        self._seek: list[int] = []
        self._discarded: list[bool] = []
        self._inspected: list[tuple[bool, bool, bool]] = []

    def extend(self, packets: list[av.Packet]) -> None:
        """Add non-empty packets, in decoding order."""
        if any(packet.pts is None for packet in packets):
            self._fallback_reason = self._fallback_reason or "a packet has no timestamp"
        pts = [packet.pts or 0 for packet in packets]
        self._pts += pts
        dts = [packet.dts for packet in packets]
        self._seek += [p if d is None or p < d else d for p, d in zip(pts, dts, strict=True)]
        discarded = [packet.is_discard for packet in packets]
        self._discarded += discarded
        self.num_shown += len(packets) - sum(discarded)
        inspect = self._inspector.inspect
        self._inspected += [inspect(memoryview(p), is_key=p.is_keyframe) for p in packets]
        # As at a change of sample description in MP4.
        if any(has_side_data(packet, "new_extradata", "param_change") for packet in packets):
            self._fallback_reason = self._fallback_reason or "parameter sets change"

    def build(self) -> FrameTable:
        """The table of the packets added so far."""
        pts = np.array(self._pts, dtype=np.int64)
        inspected = np.array(self._inspected, dtype=bool).reshape(-1, 3)
        keys, is_idr, is_unreferenced = np.ascontiguousarray(inspected.T)
        shown = np.flatnonzero(~np.array(self._discarded, dtype=bool))
        frame_packet = shown[np.argsort(pts[shown], kind="stable")]
        packet_frame = np.full(len(pts), -1, dtype=np.int64)
        packet_frame[frame_packet] = np.arange(len(frame_packet))

        reason = self._fallback_reason or self._inspector.fallback_reason
        if reason is None and len(pts):
            if not keys[0]:
                reason = "decoding cannot start at the first packet"
            elif np.any(pts[shown] < pts[0]):
                reason = "frames are shown before the first keyframe"
            elif np.any(np.diff(pts[frame_packet]) == 0):
                reason = "two packets have the same timestamp"
            else:
                # In no codec is a frame shown after a keyframe that is stored later.
                latest_before = np.maximum.accumulate(pts[shown])[:-1]
                if np.any(keys[shown][1:] & (pts[shown][1:] < latest_before)):
                    reason = "timestamps go back at a keyframe"
                elif _goes_back(pts[shown], packet_frame[shown], keys[shown]):
                    reason = "a timestamp goes back further than in any valid stream"
        return FrameTable(
            packet_pts=pts,
            packet_frame=packet_frame,
            frame_packet=frame_packet,
            packet_seek=np.array(self._seek, dtype=np.int64),
            safe_key=keys,
            is_idr=is_idr,
            is_unreferenced=is_unreferenced,
            fallback_reason=reason,
        )


def _goes_back(pts: np.ndarray, frame: np.ndarray, is_key: np.ndarray) -> bool:
    """Whether a packet is shown earlier than a valid stream allows, given its place in the file.

    Frames wait in the decoded picture buffer for those shown before them. After a keyframe, only
    leading pictures are shown before it, and none before the keyframe that precedes it.
    """
    position = np.arange(len(pts))
    keys = np.flatnonzero(is_key)
    if not len(keys):  # an edit list may hide all of them
        return bool(np.any(position - frame > _MAX_WAITING))
    previous = np.searchsorted(keys, position, side="right") - 2
    before_previous = (previous >= 0) & (pts < pts[keys[np.maximum(previous, 0)]])
    return bool(np.any(before_previous | (position - frame > _MAX_WAITING)))


def has_side_data(packet: av.Packet, *kinds: PktSideDataT) -> bool:
    """Whether the demuxer attached side data of one of these kinds to the packet."""
    if next(packet.iter_sidedata(), None) is None:  # as nearly always, and much faster
        return False
    return any(map(packet.has_sidedata, kinds))
