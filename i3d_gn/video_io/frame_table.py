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

Bitstream fields are named as in ITU-T H.264 (7.3.1, 7.3.3, 7.4.1) and the VP9 specification (6.2).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Containers that store a timestamp for every frame, and codecs with one shown frame per packet.
_TRUSTED_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
_TRUSTED_CODECS = frozenset({"h264", "hevc", "vp9", "av1"})


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
        has_false_keys: Whether packets are marked as keyframes at which decoding cannot start.
        fallback_reason: Why packets may not correspond to frames, or `None` if they do.
    """

    packet_pts: np.ndarray
    packet_frame: np.ndarray
    frame_packet: np.ndarray
    packet_seek: np.ndarray
    safe_key: np.ndarray
    has_false_keys: bool
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
        self._codec = codec
        self._fallback_reason = None
        if container not in _TRUSTED_CONTAINERS:
            self._fallback_reason = f"{container} files may lack timestamps of frames"
        elif codec not in _TRUSTED_CODECS:
            self._fallback_reason = f"a {codec} packet may hold no frame or several"
        self.num_shown = 0
        self.nal_length_size = nal_length_size(extradata) if codec == "h264" else 0
        self._pts: list[int] = []
        self._seek: list[int] = []
        self._keys: list[bool] = []
        self._discarded: list[bool] = []
        self._has_false_keys = False

    def extend(self, packets: list) -> None:
        """Add non-empty packets (`av.Packet`), in decoding order."""
        pts = [packet.pts for packet in packets]
        if None in pts:
            self._fallback_reason = self._fallback_reason or "a packet has no timestamp"
            pts = [0 if p is None else p for p in pts]
        self._pts += pts
        dts = [packet.dts for packet in packets]
        self._seek += [p if d is None or p < d else d for p, d in zip(pts, dts, strict=True)]
        discarded = [packet.is_discard for packet in packets]
        self._discarded += discarded
        self.num_shown += len(packets) - sum(discarded)
        keys = [packet.is_keyframe for packet in packets]
        if self.nal_length_size:
            for number in [n for n, is_key in enumerate(keys) if is_key]:
                keys[number] = h264_is_intra(packets[number], self.nal_length_size)
                self._has_false_keys |= not keys[number]
        self._keys += keys
        if self._codec == "vp9" and not all(map(vp9_is_shown, packets)):
            self._fallback_reason = self._fallback_reason or "a packet holds no shown frame"

    def build(self) -> FrameTable:
        """The table of the packets added so far."""
        pts = np.array(self._pts, dtype=np.int64)
        keys = np.array(self._keys, dtype=bool)
        shown = np.flatnonzero(~np.array(self._discarded, dtype=bool))
        frame_packet = shown[np.argsort(pts[shown], kind="stable")]
        packet_frame = np.full(len(pts), -1, dtype=np.int64)
        packet_frame[frame_packet] = np.arange(len(frame_packet))

        reason = self._fallback_reason
        if reason is None and len(pts):
            if not keys[0]:
                reason = "the first packet is not a keyframe"
            elif np.any(pts[shown] < pts[0]):
                reason = "frames are shown before the first keyframe"
            elif np.any(np.diff(pts[frame_packet]) == 0):
                reason = "two packets have the same timestamp"
            else:
                # In no codec is a frame shown after a keyframe that is stored later.
                latest_before = np.maximum.accumulate(pts[shown])[:-1]
                if np.any(keys[shown][1:] & (pts[shown][1:] < latest_before)):
                    reason = "timestamps go back at a keyframe"
        return FrameTable(
            packet_pts=pts,
            packet_frame=packet_frame,
            frame_packet=frame_packet,
            packet_seek=np.array(self._seek, dtype=np.int64),
            safe_key=keys,
            has_false_keys=self._has_false_keys,
            fallback_reason=reason,
        )


def nal_length_size(extradata: bytes) -> int:
    """Size in bytes of a NAL unit's length prefix, from the `avcC` box; 0 for Annex B streams."""
    is_avcc = len(extradata) >= 7 and extradata[0] == 1
    return (extradata[4] & 3) + 1 if is_avcc else 0


def h264_is_disposable(packet, length_size: int) -> bool:
    """Whether no frame references this one: nal_ref_idc is 0 in all its slices."""
    found_slice = False
    for _, header in _slices(memoryview(packet), length_size):
        if header & 0x60:  # nal_ref_idc
            return False
        found_slice = True
    return found_slice


def h264_is_intra(packet, length_size: int) -> bool:
    """Whether the frame references no other frame: all its slices are IDR, I or SI.

    Streams with periodic intra refresh mark packets as keyframes that are not.
    """
    data = memoryview(packet)
    found_slice = False
    for start, header in _slices(data, length_size):
        if header & 0x1F != 5 and _slice_type(data[start + 1 : start + 9]) % 5 not in (2, 4):
            return False
        found_slice = True
    return found_slice


def vp9_is_shown(packet) -> bool:
    """Whether a VP9 packet contains a shown frame (a superframe always does)."""
    data = memoryview(packet)
    if data[-1] & 0xE0 == 0xC0:  # superframe marker
        return True
    bits = data[0]
    profile = (bits >> 5 & 1) | (bits >> 4 & 1) << 1
    after_profile = bits << (5 if profile == 3 else 4) & 0xFF
    show_existing_frame, show_frame = after_profile & 0x80, after_profile & 0x20
    return bool(show_existing_frame or show_frame)


def _slices(data: memoryview, length_size: int) -> Iterator[tuple[int, int]]:
    """Position and first byte of each NAL unit with a slice (nal_unit_type 1 to 5)."""
    position = 0
    while position + length_size < len(data):
        size = int.from_bytes(data[position : position + length_size], "big")
        position += length_size
        header = data[position]
        if 1 <= header & 0x1F <= 5:
            yield position, header
        position += size


def _slice_type(data: memoryview) -> int:
    """slice_type: the second ue(v) of a slice header, after first_mb_in_slice; -1 if truncated."""
    bits = int.from_bytes(data, "big")
    remaining = 8 * len(data)
    value = 0
    for _ in range(2):
        zeros = remaining - bits.bit_length()
        remaining -= 2 * zeros + 1
        if remaining < 0:
            return -1  # -1 % 5 is not an intra type
        value = (bits >> remaining) - 1
        bits &= (1 << remaining) - 1
    return value
