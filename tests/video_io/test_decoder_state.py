"""Frames that depend on more than the packets since the last keyframe."""

import av
import numpy as np
import pytest
from av.packet import PacketSideData, packet_sidedata_type_from_literal
from av.video.frame import PictureType

from i3d_gn.video_io import decode_pyav
from i3d_gn.video_io.bitstream import inspector_of
from i3d_gn.video_io.decode import decode_frames, probe_video

pytestmark = pytest.mark.timeout(120)

BACKENDS = pytest.mark.parametrize("backend", ["pyav", "decord"])
# With CAVLC, and in HEVC with other chroma offsets, slices decode without an error with the
# parameter sets of the wrong segment.
CAVLC = "scenecut=0:cabac=0:b-adapt=0"
X264_SEGMENTS = (CAVLC + ":qp=30", CAVLC + ":qp=12:chroma-qp-offset=9")
X265 = "keyint=12:min-keyint=12:scenecut=0:bframes=2:log-level=none:pools=1:frame-threads=1:qp=30"
X265_SEGMENTS = (X265, X265 + ":cbqpoffs=9:crqpoffs=9")


def assert_each_frame_alone(path, expected, backend) -> None:
    """Every frame decoded by itself equals that of the sequential decode."""
    wrong = [
        index
        for index, frame in enumerate(expected)
        if not np.array_equal(decode_frames(path, [index], backend=backend)[0], frame)
    ]
    assert not wrong


def with_data(packet, data: bytes):
    """A packet with other data."""
    new = av.Packet(data)
    new.is_keyframe = packet.is_keyframe
    return new


def with_units(packet, units: list[bytes]):
    """The packet with further NAL units before its own."""
    prefix = b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)
    return with_data(packet, prefix + bytes(packet))


def avcc_units(path) -> list[bytes]:
    """SPS and PPS of an MP4 file (ISO/IEC 14496-15, 5.3.3.1)."""
    with av.open(str(path)) as container:
        header = bytes(container.streams.video[0].codec_context.extradata)
    sps_end = 8 + int.from_bytes(header[6:8], "big")
    pps_end = sps_end + 3 + int.from_bytes(header[sps_end + 1 : sps_end + 3], "big")
    return [header[8:sps_end], header[sps_end + 3 : pps_end]]


def hvcc_units(path) -> list[bytes]:
    """VPS, SPS and PPS of an MP4 file (ISO/IEC 14496-15, 8.3.3.1)."""
    with av.open(str(path)) as container:
        header = bytes(container.streams.video[0].codec_context.extradata)
    units, position = [], 23
    for _ in range(header[22]):
        size = int.from_bytes(header[position + 3 : position + 5], "big")
        units.append(header[position + 5 : position + 5 + size])
        position += 5 + size
    return units


@pytest.fixture(scope="module")
def x264_segments(tmp_path_factory, encode_video):
    """Two videos of the same size with different parameter sets."""
    folder = tmp_path_factory.mktemp("x264")
    return [
        encode_video(
            folder / f"{number}.mp4",
            num_frames=36,
            options={"g": "12", "bf": "2", "x264-params": parameters},
        )
        for number, parameters in enumerate(X264_SEGMENTS)
    ]


@BACKENDS
@pytest.mark.parametrize("seek", [False, True])
def test_new_sample_description(
    seek, backend, tmp_path, x264_segments, join_videos, decode_sequentially, monkeypatch
):
    """As written by `ffmpeg -f concat -c copy` of two recordings."""
    headers = []
    for source in x264_segments:
        with av.open(str(source)) as container:
            headers.append(bytes(container.streams.video[0].codec_context.extradata))

    def edit(source, number, packet):
        if number == 0:
            kind = packet_sidedata_type_from_literal("new_extradata")
            header = PacketSideData(kind, len(headers[source]))
            header.update(headers[source])
            packet.set_sidedata(header)
        return packet

    path = join_videos(x264_segments, tmp_path / "joined.mp4", edit=edit)
    with av.open(str(path)) as container:
        changes = [p.has_sidedata("new_extradata") for p in container.demux(video=0)]
    assert changes.index(True) == 36
    if seek:
        monkeypatch.setattr(decode_pyav, "KEEP_PACKETS_BYTES", 0)
    assert_each_frame_alone(path, decode_sequentially(path), backend)


@BACKENDS
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_parameter_sets_in_h264_packets(
    container, backend, tmp_path, x264_segments, join_videos, decode_sequentially
):
    units = [avcc_units(source) for source in x264_segments]
    path = join_videos(
        x264_segments,
        tmp_path / f"joined.{container}",
        edit=lambda source, n, packet: packet if n else with_units(packet, units[source]),
    )
    assert_each_frame_alone(path, decode_sequentially(path), backend)


def test_parameter_set_in_a_skipped_packet(tmp_path, x264_segments, join_videos):
    """A PPS in a B-frame that is not referenced replaces that of the header from then on."""
    source = x264_segments[0]
    with av.open(str(source)) as reader:
        packets = [bytes(p) for p in reader.demux(video=0) if p.size]
    unreferenced = next(n for n, data in enumerate(packets) if n > 13 and data[4] & 0x60 == 0)
    _, pps = avcc_units(x264_segments[1])
    path = join_videos(
        [source],
        tmp_path / "pps.mp4",
        edit=lambda _, n, packet: packet if n != unreferenced else with_units(packet, [pps]),
    )
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        expected = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    with av.open(str(source)) as container:
        container.streams.video[0].thread_type = "NONE"
        before = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert not np.array_equal(expected[-1], before[-1])
    assert_each_frame_alone(path, expected, "pyav")


@BACKENDS
def test_parameter_sets_in_hevc_packets(
    backend, tmp_path, encode_video, join_videos, decode_sequentially
):
    sources = [
        encode_video(
            tmp_path / f"{number}.mp4",
            codec="libx265",
            num_frames=36,
            options={"x265-params": parameters},
        )
        for number, parameters in enumerate(X265_SEGMENTS)
    ]
    units = [hvcc_units(source) for source in sources]
    path = join_videos(
        sources,
        tmp_path / "joined.mp4",
        edit=lambda source, n, packet: packet if n else with_units(packet, units[source]),
    )
    assert_each_frame_alone(path, decode_sequentially(path), backend)


@BACKENDS
def test_repeated_parameter_sets_do_not_slow_decoding_down(
    backend, tmp_path, x264_segments, join_videos, decode_sequentially, monkeypatch, caplog
):
    """As in files recorded from a broadcast: the sets of the header at each keyframe."""
    units = avcc_units(x264_segments[0])
    path = join_videos(
        x264_segments[:1] * 2,
        tmp_path / "same.mp4",
        edit=lambda _, n, packet: with_units(packet, units) if packet.is_keyframe else packet,
    )
    expected = decode_sequentially(path)
    decoded = []
    take = decode_pyav.FrameCollector.take

    def count(self, index, frame):
        decoded.append(index)
        take(self, index, frame)

    monkeypatch.setattr(decode_pyav.FrameCollector, "take", count)
    with caplog.at_level("INFO"):
        assert np.array_equal(decode_frames(path, [62], backend=backend)[0], expected[62])
    if backend == "pyav":
        assert min(decoded) == 60
    assert not caplog.records  # decord was used


@BACKENDS
@pytest.mark.parametrize(
    ("pixel_format", "options"),
    [
        ("yuv420p", {"g": "12", "bf": "0", "x264-params": "scenecut=0:qp=0"}),
        ("yuv444p", {"g": "12", "bf": "2", "x264-params": "scenecut=0:8x8dct=1"}),
    ],
)
def test_errors_of_old_x264_versions(
    pixel_format, options, backend, tmp_path, encode_video, decode_sequentially
):
    """FFmpeg imitates errors of x264 before version 151 in the profile High 4:4:4 Predictive.

    The version is in the first packet only.
    """
    path = encode_video(
        tmp_path / "new.mp4", num_frames=36, pixel_format=pixel_format, options=options
    )
    data = bytearray(path.read_bytes())
    at = data.index(b"x264 - core ") + len(b"x264 - core ")
    data[at : at + 3] = b"150"
    path.write_bytes(data)
    assert_each_frame_alone(path, decode_sequentially(path), backend)


@BACKENDS
def test_i_frame_marked_as_sync_sample(
    backend, tmp_path, encode_video, join_videos, decode_sequentially
):
    """Later frames reference frames before an I frame that is not an IDR picture."""
    height, width, change = 128, 192, 20
    blocks = np.random.default_rng(0).integers(0, 255, (8, 12, 3)).astype(np.uint8)
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)
    scenes = [smooth, blocks.repeat(16, 0).repeat(16, 1)]
    source = tmp_path / "source.mp4"
    options = {"g": "250", "bf": "0", "refs": "4", "crf": "20"}
    options["x264-params"] = "min-keyint=120:scenecut=400:rc-lookahead=40:weightp=0"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1
        for t in range(40):
            pixels = scenes[t >= change].copy()
            if t > change:  # the first scene again, in half of the frame
                pixels[:, :96] = scenes[0][:, :96]
            pixels = np.roll(pixels, t, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    with av.open(str(source)) as container:
        frames = list(container.decode(video=0))
    assert frames[change].pict_type == PictureType.I
    assert not frames[change].key_frame

    def edit(_, number, packet):
        packet.is_keyframe = number in (0, change)
        return packet

    path = join_videos([source], tmp_path / "marked.mp4", edit=edit)
    assert_each_frame_alone(path, decode_sequentially(path), backend)


@BACKENDS
def test_frame_size_changes(backend, tmp_path, encode_video, join_videos):
    """As in recordings of video calls: all frames are scaled to the size of the first."""
    options = {"g": "12", "cpu-used": "8", "b": "100k", "lag-in-frames": "0"}
    sizes = [(64, 96), (48, 80)]
    sources = [
        encode_video(
            tmp_path / f"{height}.webm",
            codec="libvpx-vp9",
            num_frames=24,
            height=height,
            width=width,
            options=options,
        )
        for height, width in sizes
    ]
    path = join_videos(sources, tmp_path / "joined.webm")
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        expected = [f.to_ndarray(format="rgb24", height=64, width=96) for f in frames]
    assert {(f.height, f.width) for f in frames} == set(sizes)
    assert probe_video(path).height == 64
    assert_each_frame_alone(path, expected, backend)
    assert np.array_equal(decode_frames(path, [3, 30], backend=backend)[1], expected[30])


# Headers with one parameter set of each kind, behind lengths of 4 bytes.
SPS, PPS = b"\x67\x64\x00\x0d\xac", b"\x68\xeb\xe3"
AVCC = b"\x01\x64\x00\x0d\xff\xe1\x00\x05" + SPS + b"\x01\x00\x03" + PPS
VPS, HEVC_SPS, HEVC_PPS = b"\x40\x01\x0c", b"\x42\x01\x01", b"\x44\x01\xc1\x72"
HVCC = b"\x01" + bytes(20) + b"\x03\x03" + b"".join(
    bytes([kind, 0, 1, 0, len(unit)]) + unit
    for kind, unit in [(0x20, VPS), (0x21, HEVC_SPS), (0x22, HEVC_PPS)]
)  # fmt: skip
# first_mb_in_slice 0, slice_type 7 (I) and 5 (P): ue(v) 1 and 0001000, 00110
IDR_SLICE, I_SLICE, P_SLICE = b"\x65\x88\x80\x10", b"\x61\x88\x80\x10", b"\x61\x98\x80\x10"
DISPOSABLE_SLICE = b"\x01\x98\x80\x10"


def packet_of(*units: bytes) -> memoryview:
    return memoryview(b"".join(len(unit).to_bytes(4, "big") + unit for unit in units))


def sei(kind: int, payload: bytes, header: bytes = b"\x06") -> bytes:
    return header + bytes([kind, len(payload)]) + payload + b"\x80"


def x264_sei(version: bytes) -> bytes:
    return sei(5, bytes(range(1, 17)) + b"x264 - core " + version)


@pytest.mark.parametrize(
    ("units", "can_start"),
    [
        ([IDR_SLICE], True),
        ([PPS, IDR_SLICE, IDR_SLICE], True),
        ([IDR_SLICE, P_SLICE], False),
        ([I_SLICE], False),
        ([P_SLICE], False),
        ([PPS], False),
        ([sei(6, b"\xc4"), I_SLICE], True),  # recovery_frame_cnt 0, exact_match_flag
        ([sei(1, b"\x55"), sei(6, b"\xc4"), I_SLICE, I_SLICE], True),
        ([sei(6, b"\xc4"), I_SLICE, P_SLICE], False),
        ([sei(6, b"\x84"), I_SLICE], False),  # no exact_match_flag
        ([sei(6, b"\xe4"), I_SLICE], False),  # broken_link_flag
        ([sei(6, b"\x58"), I_SLICE], False),  # recovery_frame_cnt 1
        ([sei(1, b"\xc4"), I_SLICE], False),
        ([b"\x61\x00\x00\x00"], False),  # truncated
    ],
)
def test_h264_keyframes_at_which_decoding_can_start(units, can_start):
    inspector = inspector_of("h264", AVCC)
    is_idr = all(unit[0] & 0x1F in (5, 8) for unit in units) and IDR_SLICE in units
    assert inspector.inspect(packet_of(*units), is_key=True) == (can_start, is_idr, False)
    assert inspector.inspect(packet_of(*units), is_key=False) == (False, is_idr, False)
    assert inspector.fallback_reason is None


def test_h264_frames_that_no_other_references():
    inspector = inspector_of("h264", AVCC)
    for units, expected in [
        ([DISPOSABLE_SLICE], True),
        ([DISPOSABLE_SLICE, DISPOSABLE_SLICE], True),
        ([DISPOSABLE_SLICE, P_SLICE], False),
        ([sei(1, b"\x55")], False),
    ]:
        assert inspector.inspect(packet_of(*units), is_key=False)[2] is expected
    # NAL units behind one length, with start codes between them
    joined = DISPOSABLE_SLICE + b"\0\0\0\1" + P_SLICE
    assert inspector.inspect(packet_of(joined), is_key=False)[2] is False


@pytest.mark.parametrize(
    ("units", "reason"),
    [
        ([SPS, PPS, IDR_SLICE], None),
        ([SPS + b"\0\0", IDR_SLICE], None),  # trailing zero bytes
        ([b"\x09\xf0" + b"\0\0\1" + PPS, IDR_SLICE], None),
        ([b"\x09\xf0" + b"\0\0\1" + PPS + b"\x01", IDR_SLICE], "parameter sets change"),
        ([SPS + b"\x01", IDR_SLICE], "parameter sets change"),
        ([b"\x68\xeb\xe1", IDR_SLICE], "parameter sets change"),
        ([b"\x68\x53\xe1", IDR_SLICE], "parameter sets change"),  # another pic_parameter_set_id
        ([sei(19, b"\x80"), IDR_SLICE], "film grain"),
        ([sei(47, b"\x80"), IDR_SLICE], "orientation"),
        ([sei(4, b"\x00\x00\x03\x01"), sei(19, b"\x80"), IDR_SLICE], "film grain"),
        ([x264_sei(b"165 r3222"), IDR_SLICE], None),
        ([x264_sei(b"34"), IDR_SLICE], None),
        ([x264_sei(b"33 svn"), IDR_SLICE], "old version of x264"),
        ([x264_sei(b"svn"), IDR_SLICE], "old version of x264"),
    ],
)
def test_h264_state_that_a_keyframe_lacks(units, reason):
    inspector = inspector_of("h264", AVCC)
    inspector.inspect(packet_of(*units), is_key=True)
    if reason is None:
        assert inspector.fallback_reason is None
    else:
        assert reason in (inspector.fallback_reason or "")


@pytest.mark.parametrize(("version", "is_old"), [(b"150", True), (b"151", False)])
def test_old_x264_in_high_444_predictive(version, is_old):
    inspector = inspector_of("h264", AVCC.replace(SPS, b"\x67\xf4" + SPS[2:]))
    inspector.inspect(packet_of(x264_sei(version), IDR_SLICE), is_key=True)
    assert bool(inspector.fallback_reason) is is_old


def test_h264_in_annex_b_packets_of_an_mp4():
    """FFmpeg's decoder accepts them, and `avcC` records as packets."""
    for data in (b"\0\0\0\1" + IDR_SLICE + bytes(8), AVCC):
        inspector = inspector_of("h264", AVCC)
        inspector.inspect(memoryview(data), is_key=True)
        assert "length" in (inspector.fallback_reason or "")


def test_header_without_parameter_sets():
    assert inspector_of("h264", b"").fallback_reason
    assert inspector_of("h264", AVCC[:6] + b"\0").fallback_reason
    assert inspector_of("hevc", b"").fallback_reason
    assert inspector_of("mpeg4", b"").fallback_reason


def test_header_with_two_parameter_sets_of_the_same_id():
    two = AVCC[:-6] + b"\x02\x00\x03" + PPS + b"\x00\x03" + b"\x68\xeb\xe1"
    inspector = inspector_of("h264", two)
    inspector.inspect(packet_of(PPS, IDR_SLICE), is_key=True)
    assert inspector.fallback_reason == "parameter sets change"
    other_id = two[:-2] + b"\x53\xe1"
    inspector = inspector_of("h264", other_id)
    inspector.inspect(packet_of(PPS, IDR_SLICE), is_key=True)
    inspector.inspect(packet_of(b"\x68\x53\xe1", IDR_SLICE), is_key=True)
    assert inspector.fallback_reason is None


def hevc_unit(kind: int, payload: bytes = b"\xaf") -> bytes:
    return bytes([kind << 1, 1]) + payload


@pytest.mark.parametrize(
    ("kind", "can_start"),
    [(0, False), (1, False), (9, False), (16, True), (19, True), (21, True), (23, True)],
)
def test_hevc_keyframes_at_which_decoding_can_start(kind, can_start):
    inspector = inspector_of("hevc", HVCC)
    assert inspector.inspect(packet_of(hevc_unit(kind)), is_key=True)[0] is can_start
    assert inspector.inspect(packet_of(hevc_unit(kind)), is_key=False)[0] is False
    assert inspector.inspect(packet_of(hevc_unit(35)), is_key=True)[0] is False
    mixed = packet_of(hevc_unit(19), hevc_unit(1))
    assert inspector.inspect(mixed, is_key=True)[0] is False


@pytest.mark.parametrize(
    ("packets", "reason"),
    [
        ([[VPS, HEVC_SPS, HEVC_PPS, hevc_unit(19)]], None),
        ([[HEVC_PPS + b"\x01", hevc_unit(19)]], "parameter sets change"),
        ([[HEVC_SPS + b"\x01", hevc_unit(19)]], "parameter sets change"),
        ([[VPS + b"\x01", hevc_unit(19)]], "parameter sets change"),
        ([[b"\x44\x09\xc1\x72", hevc_unit(19)]], "parameter sets change"),  # another layer
        ([[hevc_unit(17)]], None),
        ([[hevc_unit(16)]], "spliced"),
        ([[hevc_unit(19), hevc_unit(36, b"")]], None),
        ([[hevc_unit(19), hevc_unit(36, b"")], [hevc_unit(21)]], "spliced"),
        ([[hevc_unit(19), hevc_unit(37, b"")], [hevc_unit(21)]], "spliced"),
        ([[sei(19, b"\x80", b"\x4e\x01"), hevc_unit(19)]], "film grain"),
        ([[sei(5, b"\x80" * 20, b"\x4e\x01"), hevc_unit(19)]], None),
    ],
)
def test_hevc_state_that_a_keyframe_lacks(packets, reason):
    inspector = inspector_of("hevc", HVCC)
    for units in packets:
        inspector.inspect(packet_of(*units), is_key=True)
    if reason is None:
        assert inspector.fallback_reason is None
    else:
        assert reason in (inspector.fallback_reason or "")


@pytest.mark.parametrize(
    ("data", "can_start", "shows"),
    [
        (b"\x82\x49", True, True),  # frame_marker 2, profile 0, key frame, shown
        (b"\x86\x49", False, True),  # not a key frame
        (b"\x84\x49", False, False),  # hidden
        (b"\x88\x49", False, True),  # show_existing_frame
        (b"\x80\x49\xc0", True, True),  # superframe that starts with a hidden key frame
        (b"\xb1\x49", True, True),  # profile 3
        (b"\xb3\x49", False, True),
        (b"\xb2\x49", False, False),
    ],
)
def test_vp9_keyframes_and_shown_frames(data, can_start, shows):
    inspector = inspector_of("vp9", b"")
    assert inspector.inspect(memoryview(data), is_key=True)[0] is can_start
    assert inspector.inspect(memoryview(data), is_key=False)[0] is False
    assert (inspector.fallback_reason is None) is shows


def obu(kind: int, payload: bytes, *, has_size: bool = True, extension: bool = False) -> bytes:
    header = bytes([kind << 3 | 2 * has_size | 4 * extension]) + b"\x08" * extension
    size = bytes([0x80 | len(payload) & 0x7F, len(payload) >> 7]) if has_size else b""
    return header + size + payload


SEQUENCE_HEADER = b"\x00\x00\x00\x03\x2d"
AV1_KEY, AV1_HIDDEN_KEY, AV1_INTER = b"\x10\x00", b"\x00\x00", b"\x30\x00"


@pytest.mark.parametrize(
    ("units", "can_start"),
    [
        ([obu(2, b""), obu(1, SEQUENCE_HEADER), obu(6, AV1_KEY * 100)], True),
        ([obu(6, AV1_KEY, has_size=False)], True),
        ([obu(3, AV1_KEY, extension=True), obu(4, b"\x12")], True),
        ([obu(6, AV1_KEY), obu(6, AV1_INTER)], True),
        ([obu(6, AV1_INTER), obu(6, AV1_KEY)], False),
        ([obu(6, AV1_HIDDEN_KEY)], False),
        ([obu(6, b"\x90\x00")], False),  # show_existing_frame
        ([obu(1, SEQUENCE_HEADER)], False),
    ],
)
def test_av1_keyframes_at_which_decoding_can_start(units, can_start):
    inspector = inspector_of("av1", b"\x81\x00\x0c\x00" + obu(1, SEQUENCE_HEADER))
    packet = memoryview(b"".join(units))
    assert inspector.inspect(packet, is_key=True)[0] is can_start
    assert inspector.inspect(packet, is_key=False)[0] is False
    assert inspector.fallback_reason is None


def test_av1_reduced_still_picture():
    """Its frame headers lack show_existing_frame and frame_type."""
    header = b"\x18" + SEQUENCE_HEADER[1:]
    inspector = inspector_of("av1", b"\x81\x00\x0c\x00" + obu(1, header))
    assert inspector.inspect(memoryview(obu(6, AV1_INTER)), is_key=True)[0]


@pytest.mark.parametrize("in_header", [True, False])
def test_av1_sequence_header_changes(in_header):
    first = obu(1, SEQUENCE_HEADER)
    inspector = inspector_of("av1", b"\x81\x00\x0c\x00" + first if in_header else b"")
    for _ in range(2):
        inspector.inspect(memoryview(first + obu(6, AV1_KEY)), is_key=True)
    assert inspector.fallback_reason is None
    changed = obu(1, SEQUENCE_HEADER + b"\x01")
    inspector.inspect(memoryview(changed + obu(6, AV1_KEY)), is_key=True)
    assert inspector.fallback_reason == "the sequence header changes"
