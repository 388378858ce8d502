"""What a packet tells about decoding, without decoding it: keyframes and decoder state.

Decoding may start at a keyframe only if it brings along all state that the decoder would have
after decoding everything before. Not all packets marked as keyframes do, and some state comes in
other packets: parameter sets that replace those of the file's header, film grain, or the version of
an old x264 whose errors FFmpeg's decoder imitates. The inspectors below read just enough of each
packet to tell.

Names are those of the specifications: ITU-T H.264 (7.3.1, 7.3.3, 7.4.1, Annex D), H.265 (7.3.1,
7.4.2.2), VP9 (6.2, Annex B), AV1 (5.3 to 5.9), and ISO/IEC 14496-15 (5.3.3.1, 8.3.3.1) for the
`avcC` and `hvcC` records.
"""

import re
from collections.abc import Iterator
from typing import Protocol

# H.264 nal_unit_type.
_H264_IDR, _H264_SEI, _H264_SPS, _H264_PPS = 5, 6, 7, 8

# HEVC nal_unit_type. Pictures from BLA_W_LP to CRA are random access points (IRAP).
_HEVC_BLA_W_LP, _HEVC_LAST_IRAP, _HEVC_LAST_VCL = 16, 23, 31
_HEVC_PPS = 34
_HEVC_PARAMETER_SETS = (32, 33, _HEVC_PPS)
_HEVC_END_OF_SEQUENCE, _HEVC_END_OF_BITSTREAM, _HEVC_PREFIX_SEI = 36, 37, 39

# SEI payload types, the same in H.264 and HEVC.
_USER_DATA_UNREGISTERED, _RECOVERY_POINT = 5, 6
_PERSISTENT_SEI = {19: "film grain may apply to later frames", 47: "frames differ in orientation"}

_AV1_SEQUENCE_HEADER, _AV1_FRAME_HEADERS = 1, (3, 6)

_HIGH_444_PREDICTIVE = 244  # profile_idc, of lossless streams as well
_X264_BUILD = b"x264 - core "


class Inspector(Protocol):
    """Inspects the packets of one stream in decoding order.

    Attributes:
        fallback_reason: Why decoding must start at the first packet, or `None`. Set by the packets
            inspected so far.
    """

    fallback_reason: str | None

    def inspect(self, packet: memoryview, *, is_key: bool) -> tuple[bool, bool, bool]:
        """Inspect the next packet, which the container marks as keyframe if `is_key`.

        Returns:
            Whether decoding may start at the packet, whether it is an IDR picture of H.264, and
            whether its frame is known not to be referenced by others.
        """
        ...


def inspector_of(codec: str, extradata: bytes) -> Inspector:
    """The inspector for a codec, by FFmpeg's name; `extradata` is the codec's header."""
    if codec == "h264":
        return _H264(extradata)
    if codec == "hevc":
        return _Hevc(extradata)
    if codec == "vp9":
        return _Vp9()
    if codec == "av1":
        return _Av1(extradata)
    return _Unknown()


class _Unknown:
    fallback_reason: str | None = "frames of the codec may depend on more than the last keyframe"

    def inspect(self, packet: memoryview, *, is_key: bool) -> tuple[bool, bool, bool]:
        return is_key, False, False


class _ParameterSets:
    """Parameter sets of the header, with which those of packets are compared.

    A decoder that starts at a later packet has the sets of the header only, so that any other set
    in a packet, or a second set of the same id, is state that a keyframe does not bring along.
    """

    def __init__(self, sets: list[tuple[object, bytes]]) -> None:
        self._sets: dict[object, bytes | None] = {}
        for key, unit in sets:
            stripped = unit.rstrip(b"\0")
            is_only = self._sets.get(key, stripped) == stripped
            self._sets[key] = stripped if is_only else None

    def __len__(self) -> int:
        return len(self._sets)

    def has(self, key: object, unit: bytes) -> bool:
        """Whether the header has this set, and no other of the same key."""
        return self._sets.get(key) == unit.rstrip(b"\0")


class _H264:
    def __init__(self, extradata: bytes) -> None:
        self.fallback_reason: str | None = None
        self._length_size, units = _parse_avcc(extradata)
        self._sets = _ParameterSets([(_h264_set_key(unit), unit) for unit in units])
        if not self._sets:
            self.fallback_reason = "the header has no parameter sets"
        self._is_high_444 = any(
            unit[0] & 0x1F == _H264_SPS and unit[1] == _HIGH_444_PREDICTIVE for unit in units
        )

    def inspect(self, packet: memoryview, *, is_key: bool) -> tuple[bool, bool, bool]:
        data = bytes(packet)
        is_idr = is_intra = is_unreferenced = True
        has_slice = recovers = False
        for start, end in _nal_units(data, self._length_size):
            header = data[start]
            kind = header & 0x1F
            if 1 <= kind <= _H264_IDR:
                has_slice = True
                is_unreferenced &= not header & 0x60  # nal_ref_idc
                if kind != _H264_IDR:
                    is_idr = False
                    if is_key and is_intra:
                        is_intra = _slice_type(data[start + 1 : start + 9]) % 5 in (2, 4)
            elif kind in (_H264_SPS, _H264_PPS):
                unit = data[start:end]
                if not self._sets.has(_h264_set_key(unit), unit):
                    self.fallback_reason = "parameter sets change"
            elif kind == _H264_SEI:
                recovers |= self._inspect_sei(data[start + 1 : end])
        if _h264_is_other_framing(data, self._length_size):
            self.fallback_reason = "NAL units are not preceded by their length"
        can_start = is_key and has_slice and (is_idr or (is_intra and recovers))
        return can_start, has_slice and is_idr, has_slice and is_unreferenced

    def _inspect_sei(self, unit: bytes) -> bool:
        """Note state in an SEI unit; whether decoding may start at its I picture."""
        recovers = False
        for kind, payload in _sei_messages(unit):
            if kind == _RECOVERY_POINT:
                # recovery_frame_cnt 0 (ue), exact_match_flag 1, broken_link_flag 0
                recovers |= payload[:1] != b"" and payload[0] & 0xE0 == 0xC0
            elif kind == _USER_DATA_UNREGISTERED and payload[16:].startswith(_X264_BUILD):
                # FFmpeg imitates errors of these versions once it has seen the message, which only
                # the first packet has.
                digits = re.match(rb"\d*", payload[16 + len(_X264_BUILD) :])
                build = int(digits[0] or 0) if digits else 0
                if build < 34 or (build < 151 and self._is_high_444):
                    self.fallback_reason = "an old version of x264 must be known to decode it"
            elif kind in _PERSISTENT_SEI:
                self.fallback_reason = _PERSISTENT_SEI[kind]
        return recovers


class _Hevc:
    def __init__(self, extradata: bytes) -> None:
        self.fallback_reason: str | None = None
        self._length_size, units = _parse_hvcc(extradata)
        self._sets = _ParameterSets(
            [(_hevc_set_key(u), u) for u in units if u[0] >> 1 & 0x3F in _HEVC_PARAMETER_SETS]
        )
        if not self._sets:
            self.fallback_reason = "the header has no parameter sets"
        self._has_ended = False

    def inspect(self, packet: memoryview, *, is_key: bool) -> tuple[bool, bool, bool]:
        data = bytes(packet)
        has_slice, is_random_access = False, True
        for start, end in _nal_units(data, self._length_size):
            kind = data[start] >> 1 & 0x3F
            if kind <= _HEVC_LAST_VCL:
                has_slice = True
                is_random_access &= _HEVC_BLA_W_LP <= kind <= _HEVC_LAST_IRAP
                if kind == _HEVC_BLA_W_LP or self._has_ended:
                    # Frames that reference pictures before such a splice are dropped.
                    self.fallback_reason = "the bitstream is spliced"
            elif kind in _HEVC_PARAMETER_SETS:
                unit = data[start:end]
                if not self._sets.has(_hevc_set_key(unit), unit):
                    self.fallback_reason = "parameter sets change"
            elif kind in (_HEVC_END_OF_SEQUENCE, _HEVC_END_OF_BITSTREAM):
                self._has_ended = True
            elif kind == _HEVC_PREFIX_SEI:
                for sei_kind, _ in _sei_messages(data[start + 2 : end]):
                    if sei_kind in _PERSISTENT_SEI:
                        self.fallback_reason = _PERSISTENT_SEI[sei_kind]
        return is_key and has_slice and is_random_access, False, False


class _Vp9:
    """Keyframes of VP9 reset all state of the decoder (setup_past_independence)."""

    def __init__(self) -> None:
        self.fallback_reason: str | None = None

    def inspect(self, packet: memoryview, *, is_key: bool) -> tuple[bool, bool, bool]:
        bits = packet[0]
        profile = (bits >> 5 & 1) | (bits >> 4 & 1) << 1
        after_profile = bits << (5 if profile == 3 else 4) & 0xFF
        show_existing_frame, frame_type, show_frame = (
            after_profile & bit for bit in (0x80, 0x40, 0x20)
        )
        is_superframe = packet[-1] & 0xE0 == 0xC0  # has a shown frame, maybe not the first
        if not (is_superframe or show_existing_frame or show_frame):
            self.fallback_reason = "a packet has no shown frame"
        return is_key and not show_existing_frame and not frame_type, False, False


class _Av1:
    def __init__(self, extradata: bytes) -> None:
        self.fallback_reason: str | None = None
        self._sequence_header: bytes | None = None
        if len(extradata) > 4 and extradata[0] == 0x81:  # av1C, marker and version
            for kind, payload in _obus(memoryview(extradata)[4:]):
                if kind == _AV1_SEQUENCE_HEADER:
                    self._sequence_header = bytes(payload)

    def inspect(self, packet: memoryview, *, is_key: bool) -> tuple[bool, bool, bool]:
        is_shown_key = None
        for kind, payload in _obus(packet):
            if kind == _AV1_SEQUENCE_HEADER:
                header = bytes(payload)
                if self._sequence_header is None:
                    self._sequence_header = header
                elif header != self._sequence_header:
                    self.fallback_reason = "the sequence header changes"
            elif kind in _AV1_FRAME_HEADERS and is_shown_key is None and len(payload):
                # show_existing_frame 0, frame_type KEY_FRAME (0), show_frame 1, unless
                # reduced_still_picture_header
                reduced = bool(self._sequence_header and self._sequence_header[0] & 0x08)
                is_shown_key = reduced or payload[0] & 0xF0 == 0x10
        return is_key and bool(is_shown_key), False, False


def _parse_avcc(extradata: bytes) -> tuple[int, list[bytes]]:
    """Size of a NAL unit's length and the parameter sets in an `avcC` record; 0 if it is none."""
    if len(extradata) < 7 or extradata[0] != 1:
        return 0, []
    units, position = [], 5
    for count_mask in (0x1F, 0xFF):
        count = extradata[position] & count_mask if position < len(extradata) else 0
        found, position = _length_prefixed(extradata, position + 1, count)
        units += found
    return (extradata[4] & 3) + 1, units


def _parse_hvcc(extradata: bytes) -> tuple[int, list[bytes]]:
    """Size of a NAL unit's length and the NAL units in an `hvcC` record; 0 if it is none."""
    if len(extradata) < 23 or not (extradata[0] or extradata[1] or extradata[2] > 1):
        return 0, []
    units, position = [], 23
    for _ in range(extradata[22]):
        count = int.from_bytes(extradata[position + 1 : position + 3], "big")
        found, position = _length_prefixed(extradata, position + 3, count)
        units += found
    return (extradata[21] & 3) + 1, units


def _length_prefixed(record: bytes, position: int, count: int) -> tuple[list[bytes], int]:
    """Units behind 16-bit lengths, and the position after them."""
    units = []
    for _ in range(count):
        size = int.from_bytes(record[position : position + 2], "big")
        unit = record[position + 2 : position + 2 + size]
        if len(unit) > 1:
            units.append(unit)
        position += 2 + size
    return units, position


def _nal_units(data: bytes, length_size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 position of each NAL unit in a packet.

    Behind a length there may be several with start codes between them, as FFmpeg reads it.
    """
    position, end = 0, len(data)
    while length_size and position + length_size < end:
        start = position + length_size
        position = start + int.from_bytes(data[position:start], "big")
        stop = min(position, end)
        while start < stop:
            start_code = data.find(b"\0\0\1", start, stop)
            yield start, stop if start_code < 0 else start_code
            start = stop if start_code < 0 else start_code + 3


def _h264_is_other_framing(data: bytes, length_size: int) -> bool:
    """Whether a packet is in Annex B format or an `avcC` record, which FFmpeg's decoder accepts."""
    if length_size == 4 and data[:4] == b"\0\0\0\1":
        return True
    return len(data) > 8 and data[0] == 1 and data[2] == 0 and data[4] & 0xFC == 0xFC


def _h264_set_key(unit: bytes) -> tuple[int, int]:
    """What identifies a parameter set: its type and id."""
    kind = unit[0] & 0x1F
    # seq_parameter_set_id follows profile_idc, the constraint flags and level_idc.
    identifier = unit[4:8] if kind == _H264_SPS else unit[1:5]
    return kind, _exp_golomb(identifier, 1)


def _hevc_set_key(unit: bytes) -> tuple[int, int, int]:
    """What identifies a parameter set: its type, its layer, and of a PPS its id."""
    kind, layer = unit[0] >> 1 & 0x3F, (unit[0] & 1) << 5 | unit[1] >> 3
    return kind, layer, _exp_golomb(unit[2:6], 1) if kind == _HEVC_PPS else 0


def _slice_type(data: bytes) -> int:
    """slice_type: the second ue(v) of a slice header, after first_mb_in_slice; -1 if truncated."""
    return _exp_golomb(data, 2)


def _exp_golomb(data: bytes, number: int) -> int:
    """The last of so many ue(v) (H.264, 9.1) at the start of `data`; -1 if truncated."""
    bits = int.from_bytes(data, "big")
    remaining = 8 * len(data)
    value = -1
    for _ in range(number):
        zeros = remaining - bits.bit_length()
        remaining -= 2 * zeros + 1
        if remaining < 0:
            return -1
        value = (bits >> remaining) - 1
        bits &= (1 << remaining) - 1
    return value


def _sei_messages(unit: bytes) -> Iterator[tuple[int, bytes]]:
    """Payload type and payload of each message in an SEI NAL unit without its header."""
    data = unit.replace(b"\0\0\3", b"\0\0")  # emulation prevention
    position = 0
    while position + 2 < len(data):  # rbsp_trailing_bits are one byte
        numbers = [0, 0]  # payload type and size
        for n in (0, 1):
            while position < len(data) and data[position] == 0xFF:
                numbers[n] += 0xFF
                position += 1
            numbers[n] += data[position] if position < len(data) else 0
            position += 1
        yield numbers[0], data[position : position + numbers[1]]
        position += numbers[1]


def _obus(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and payload of each open bitstream unit."""
    position, end = 0, len(data)
    while position < end:
        header = data[position]
        position += 2 if header & 4 else 1  # extension_flag
        size = end - position
        if header & 2:  # has_size_field, leb128
            size = 0
            for shift in range(0, 56, 7):
                if position >= end:
                    return
                size |= (data[position] & 0x7F) << shift
                position += 1
                if not data[position - 1] & 0x80:
                    break
        yield header >> 3 & 0x0F, data[position : position + size]
        position += size
